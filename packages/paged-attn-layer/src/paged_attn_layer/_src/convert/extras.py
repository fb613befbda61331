"""Packages that only some users need: imported where they are used, with a hint where they are missing."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Tell how to install a package that the imports inside the `with` don't find.

    Raises:
        ModuleNotFoundError: a package is not installed; names it and the extra that brings it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is not installed; pip install 'paged-attn-layer[{extra}]'", name=error.name
        ) from error
