"""What the commands share: how they report errors."""

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import jax


class Parser(argparse.ArgumentParser):
    """Reports an error of the options in one line, without the long usage text."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with exit code 2."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def run_command(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], None],
    argv: Sequence[str] | None,
    memory_advice: str,
) -> int:
    """Parses the options and runs the command. Returns 0, or 2 for an error that was reported, or 130 after Ctrl-C.

    Args:
        parser: of the options; its `prog` is the command's name.
        run: the command.
        argv: the options; `None` takes the process's.
        memory_advice: what to do if there is too little memory.
    """
    args = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # what the locale cannot show is escaped, so that no answer is lost
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        run(args)
    except (ValueError, NotImplementedError, OSError, ModuleNotFoundError) as error:
        tell(parser.prog, str(error))
        return 2
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        tell(parser.prog, f"this machine cannot run it ({str(error) or 'out of memory'}); {memory_advice}")
        return 2
    except KeyboardInterrupt:
        tell(parser.prog, "interrupted")
        return 130
    return 0


def tell(command: str, message: str) -> None:
    """Prints a line to standard error."""
    print(f"{command}: {message}", file=sys.stderr)
