"""The instruction sets of the CPU kernels that tests can run here."""

import dataclasses

import pytest

from paged_kernels import get_backend
from paged_kernels._src.cpu import library


def usable_targets() -> tuple[str, ...]:
    """Returns the instruction sets of this processor; none without the compiled library."""
    try:
        return library.targets()
    except NotImplementedError:
        return ()


TARGETS = usable_targets()
needs_library = pytest.mark.skipif(not TARGETS, reason="paged-kernels-cpu is not installed")


def on_target(target: str):
    """Returns the backend `cpu` with kernels of this instruction set."""
    return dataclasses.replace(get_backend("cpu"), target=target)


def in_turns(cases: list) -> list:
    """Returns `(case, target)` parameters. Ordinary runs take one target for each case, the slow session takes all."""
    return [
        pytest.param(case, target, marks=[] if (index - place) % len(TARGETS) == 0 else pytest.mark.slow)
        for index, case in enumerate(cases)
        for place, target in enumerate(TARGETS)
    ]
