"""Lets Ctrl-C wait until what it would interrupt is done."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Signals whose Python handlers commonly raise an exception: Ctrl-C, and the polite request to end."""

Handler = Callable[[int, FrameType | None], object]


class Interrupts:
    """Signals that arrived inside `hold_interrupts` and wait there."""

    def __init__(self) -> None:
        self._handlers: dict[int, Handler] = {}
        self._waiting: list[int] = []

    def deliver(self) -> None:
        """Call the handlers of the signals that wait. They may raise, as that of Ctrl-C does."""
        while self._waiting:
            number = self._waiting.pop(0)
            self._handlers[number](number, None)

    def hold(self, number: int, frame: FrameType | None) -> None:
        """The handler inside `hold_interrupts`: a first signal waits, a second one of its kind does not."""
        if number not in self._waiting:
            self._waiting.append(number)
            return
        self._waiting.remove(number)
        self._handlers[number](number, frame)

    def install(self, number: int, handler: Handler) -> None:
        """Hold a signal that had this handler."""
        self._handlers[number] = handler
        signal.signal(number, self.hold)


@contextlib.contextmanager
def hold_interrupts() -> Iterator[Interrupts]:
    """Ctrl-C and SIGTERM inside the `with` wait for its end, or for `deliver`, where a block can end cleanly.

    A second Ctrl-C does not wait: it ends a block that hangs. Blocks may be nested: signals wait for the outermost.
    Signals whose handler is not a Python function are left alone. Python calls handlers in the main thread only, so
    in other threads there is nothing to hold.

    >>> try:
    ...     with hold_interrupts():
    ...         signal.raise_signal(signal.SIGINT)
    ...         print("all of it is done")
    ... except KeyboardInterrupt:
    ...     print("then interrupted")
    all of it is done
    then interrupted
    """
    outer = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
    if isinstance(outer, Interrupts) or threading.current_thread() is not threading.main_thread():
        yield outer if isinstance(outer, Interrupts) else Interrupts()
        return
    interrupts = Interrupts()
    with contextlib.ExitStack() as stack:
        stack.callback(interrupts.deliver)  # runs last, when the handlers are back
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):
                stack.callback(signal.signal, number, handler)
                interrupts.install(number, handler)
        yield interrupts
