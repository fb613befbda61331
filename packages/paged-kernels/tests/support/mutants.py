"""Faults planted in the source text of real functions. Do the ordinary tests see them?

A mutant is one edit of one function. The edited text is compiled, and its code object replaces the function's own. So
every importer runs it. Then pytest runs the named tests in this process, and one of them must fail.
"""

import contextlib
import dataclasses
import inspect
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import jax
import pytest

SEEN_BY = (AssertionError, pytest.fail.Exception, jax.errors.JaxRuntimeError)
"""The exceptions by which a test sees a fault; the last is the interpreter's. Any other means that the edit cannot
run."""
QUIET = ("cacheprovider", "faulthandler", "threadexception", "unraisableexception", "xdist")
"""Plugins that a run inside another run does not need."""
ORDINARY = "not aot and not slow and not tpu and not once"


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One edit, and the tests that must see it."""

    function: Any
    """A function, a method, a classmethod or a property; not a closure."""
    old: str
    """Text that occurs exactly once in the function's source."""
    new: str
    """The text that replaces it."""
    tests: str
    """Node ids of pytest, relative to the folder of the package's tests, separated by spaces."""


def plain_function(function: Any) -> Callable[..., Any]:
    """Returns the Python function below descriptors and decorators."""
    function = function.fget if isinstance(function, property) else function
    return inspect.unwrap(getattr(function, "__func__", function))


def edited_code(function: Callable[..., Any], old: str, new: str) -> CodeType:
    """Returns the code object of `function` with `new` in place of `old`.

    Raises:
        ValueError: `old` does not occur exactly once, or the function is a closure.
    """
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(old) != 1:
        raise ValueError(f"{old!r} occurs {source.count(old)} times in {function.__qualname__}, it must occur once")
    module = compile(source.replace(old, new), f"<mutant of {function.__qualname__}>", "exec")
    codes = [code for code in module.co_consts if isinstance(code, CodeType) and code.co_name == function.__name__]
    if len(codes) != 1 or codes[0].co_freevars or function.__code__.co_freevars:
        raise ValueError(f"{function.__qualname__} must be one function that is no closure")
    return codes[0]


@contextlib.contextmanager
def planted(mutant: Mutant) -> Iterator[None]:
    """Inside this context the edited function runs instead of the original, and earlier compilations are dropped."""
    function = plain_function(mutant.function)
    original = function.__code__
    function.__code__ = edited_code(function, mutant.old, mutant.new)
    jax.clear_caches()
    try:
        yield
    finally:
        function.__code__ = original
        jax.clear_caches()


class Failures:
    """A pytest plugin that collects the exceptions of failed tests."""

    def __init__(self) -> None:
        self.exceptions: list[BaseException] = []

    def pytest_exception_interact(self, call: pytest.CallInfo) -> None:
        """pytest calls this for each failure, also for a module that cannot be imported."""
        assert call.excinfo is not None
        self.exceptions.append(call.excinfo.value)


def run_tests(tests: str, folder: Path) -> list[BaseException]:
    """Runs these tests of `folder` up to the first failure. Returns its exceptions; none if all tests pass.

    Raises:
        ValueError: pytest knows no such ordinary test.
    """
    failures = Failures()
    options = ["-x", "-q", "--no-header", "--tb=short", "--capture=no", "-m", ORDINARY]
    plugins = [option for name in QUIET for option in ("-p", f"no:{name}")]
    exit_code = pytest.main([*options, *plugins, *(f"{folder}/{test}" for test in tests.split())], [failures])
    if exit_code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise ValueError(f"{tests} must be ordinary tests in {folder}: pytest ends with {exit_code}")
    return failures.exceptions


def assert_seen(mutant: Mutant, folder: Path) -> None:
    """Fails unless one of the mutant's tests, below `folder`, fails because of it."""
    with planted(mutant):
        exceptions = run_tests(mutant.tests, folder)
    if not exceptions:
        raise AssertionError(f"{mutant.tests} pass with {mutant.new!r} in place of {mutant.old!r}")
    if not isinstance(exceptions[0], SEEN_BY):
        raise ValueError(f"{mutant.new!r} in place of {mutant.old!r} does not run") from exceptions[0]
