"""The list of backends, and the choice between them.

To add a backend, write its file here and add its name to a list.
"""

import importlib
import itertools
from collections.abc import Iterable, Iterator

from paged_kernels._src.backends.base import Backend, FittedBackend
from paged_kernels._src.call import Call

BACKENDS: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "xla"),
    "gpu": ("xla",),
    "tpu": ("tpu", "xla"),
}
"""The backends that `backend=None` tries on each platform, best first."""
ELSEWHERE = ("xla",)
"""The backends of other platforms."""
BY_NAME_ONLY = ("reference", "tpu_interpret")
"""The backends that run only if they are named. They are correct, but slow."""


def backend_names() -> tuple[str, ...]:
    """Returns the names of all backends."""
    first, *others = BY_NAME_ONLY
    return tuple(dict.fromkeys((first, *itertools.chain(*BACKENDS.values()), *others)))


def get_backend(backend: str | Backend) -> Backend:
    """Returns the backend of this name, and imports it now. A `Backend` is returned as it is.

    >>> get_backend("xla").with_block_sizes(q_rows=32, kv_pages=8).name
    'xla'

    Raises:
        ValueError: there is no backend of that name.
    """
    if isinstance(backend, Backend):
        return backend
    names = backend_names()
    if backend not in names:
        raise ValueError(f"backend={backend!r} must be one of {', '.join(names)}, or None for the platform's default")
    return importlib.import_module(f"paged_kernels._src.backends.{backend}").BACKEND


def preferred_names(platform: str) -> tuple[str, ...]:
    """Returns the backends that `backend=None` tries on this platform, best first."""
    return BACKENDS.get(platform, ELSEWHERE)


def candidates(backend: str | Backend | None, platform: str) -> Iterator[Backend]:
    """Returns the given backend, or those of the platform, best first. Each is imported when it is reached."""
    return map(get_backend, preferred_names(platform) if backend is None else (backend,))


def choose(backends: Iterable[Backend], call: Call) -> FittedBackend:
    """Returns the first of these backends that can take the call, fitted to it.

    Raises:
        ValueError: it cannot run on the platform.
        NotImplementedError: none can take the call. The message says why each cannot.
    """
    reasons = []
    for backend in backends:
        try:
            return backend.fit(call)
        except NotImplementedError as error:
            reasons.append(str(error))
    raise NotImplementedError("; ".join(reasons))
