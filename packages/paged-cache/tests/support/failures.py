"""Makes a page manager's operations fail at chosen calls."""

import contextlib
import copy
import dataclasses
import hashlib
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

from paged_cache._src.manager import OutOfPages, PageManager, PagePool, Pin, prefix

SEAMS = ("pages", "hash")


class Countdown:
    """Counts calls, and raises an error at the `nth`."""

    def __init__(self, error: Callable[[], Exception], nth: int = 0) -> None:
        self.calls = 0
        self._nth = nth
        self._error = error

    def tick(self) -> None:
        """One call."""
        self.calls += 1
        if self.calls == self._nth:
            raise self._error()


class Counted:
    """Wraps a module: each call of a function ticks the countdown."""

    def __init__(self, module: types.ModuleType, countdown: Countdown) -> None:
        self._module = module
        self._countdown = countdown

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._module, name)

        def counted(*args: Any) -> Any:
            self._countdown.tick()
            return function(*args)

        return counted


@dataclasses.dataclass(frozen=True)
class Failure:
    """A failure at one call within an operation.

    pages  | no page is free, on the device or on the host
    hash   | there is no memory for a hash
    """

    seam: str
    at: int
    """The number of the call, modulo the calls of the operation."""

    def planted_in(self, operation: Callable[[PageManager], Any], manager: PageManager, pins: Sequence[Pin]) -> bool:
        """Run the operation so that it fails there; False if it has no such call."""
        calls = count_calls(self.seam, operation, manager, pins)
        if calls:
            with _planted(self.seam, 1 + self.at % calls), contextlib.suppress(OutOfPages, MemoryError):
                operation(manager)
                raise AssertionError(f"{self} had no effect")
        return calls > 0


def count_calls(seam: str, operation: Callable[[PageManager], Any], manager: PageManager, pins: Sequence[Pin]) -> int:
    """The number of calls of an operation that can fail; counted on a copy of the manager."""
    twin = copy.deepcopy(manager, {id(pin): pin for pin in pins})
    with _planted(seam, 0) as countdown:
        try:
            operation(twin)
        except OutOfPages:
            return 1 if seam == "pages" else countdown.calls
    return countdown.calls


@contextlib.contextmanager
def _planted(seam: str, nth: int) -> Iterator[Countdown]:
    countdown = Countdown(MemoryError, nth)
    if seam == "pages":
        with mock.patch.object(PagePool, "num_free", 0):
            yield countdown
    else:
        with mock.patch.object(prefix, "hashlib", Counted(hashlib, countdown)):
            yield countdown
