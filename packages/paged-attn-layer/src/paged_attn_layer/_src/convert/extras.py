"""Says what to install when an optional package is missing."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Runs imports of optional packages; an error says how to install what is missing.

    Raises:
        ModuleNotFoundError: a package is not installed; names it, and the extra to install.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is not installed; pip install 'paged-attn-layer[{extra}]'", name=error.name
        ) from error
