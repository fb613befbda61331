"""The entry of the command `paged-generate`: Ctrl-C ends it without a traceback, also while jax is imported.

A module of its own, for importing `paged_attn_layer` takes seconds, in which Ctrl-C must be handled already.
"""

import importlib
import os
import signal
import sys
from types import FrameType


def main() -> int:
    """Run the command. Returns the exit code: 0, or 2 for an error that was reported, or 130 after Ctrl-C."""
    return run_entry("paged-generate", "paged_attn_layer._src.cli")


def run_entry(command: str, module: str) -> int:
    """Import the module of a command, and run its `main`. Returns the exit code."""

    def end(_number: int, _frame: FrameType | None) -> None:
        """Ends the process at once. An exception could be lost in the code that is being imported."""
        os.write(2, f"{command}: interrupted\n".encode())
        os._exit(130)

    handled = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not so in the background of a shell
    if handled:
        signal.signal(signal.SIGINT, end)
    imported = importlib.import_module(module)
    try:
        if handled:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return imported.main()
    except KeyboardInterrupt:  # before or after what the module's `main` guards
        return 130
    finally:
        if handled:
            signal.signal(signal.SIGINT, end)


if __name__ == "__main__":
    sys.exit(main())
