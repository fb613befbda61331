"""Counts the programs that XLA compiles. Steps after the warm-up must compile none."""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax.monitoring

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
"""The event that jax records once for each program that it compiles (jax 0.10 to 0.12)."""


@dataclasses.dataclass
class CompilationCount:
    """The number of programs compiled inside one `count_compilations`."""

    total: int = 0


@contextlib.contextmanager
def count_compilations() -> Iterator[CompilationCount]:
    """Count the programs that this process compiles inside the `with`.

    >>> import jax
    >>> with count_compilations() as count:
    ...     _ = jax.jit(lambda x: x + 1).lower(1).compile()
    >>> count.total
    1
    """
    count = CompilationCount()

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:  # the signature that jax calls
        count.total += event == COMPILE_EVENT

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield count
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
