"""The best that each chip can do per cycle. Figures are compared with these limits."""

import dataclasses
from importlib.metadata import PackageNotFoundError, version

from paged_kernels._src.tpu.chip import CHIPS, Chip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """One core's clock and matrix units.

    `clock` is the peak of bfloat16 operations per second and core that Google publishes, divided by
    `flops_per_cycle`. The peaks: v5e 197e12, v5p 459e12 / 2, v6e 918e12, tpu7x 2307e12 / 2 (two cores per chip).
    """

    topology: str
    """Name of the smallest slice that libtpu knows."""
    clock: float
    """Cycles per second."""
    flops_per_cycle: int
    """bfloat16 operations of all matrix units per cycle."""
    matrix_width: int
    """Rows and columns of a matrix unit. A head of half this size leaves half of the unit idle."""


LIMITS = {
    "v5e": Limits(topology="v5e:2x2", clock=1.50e9, flops_per_cycle=131072, matrix_width=128),
    "v5p": Limits(topology="v5p:2x2x1", clock=1.75e9, flops_per_cycle=131072, matrix_width=128),
    "v6e": Limits(topology="v6e:2x2", clock=1.75e9, flops_per_cycle=524288, matrix_width=256),
    "tpu7x": Limits(topology="tpu7x:2x2x1", clock=2.20e9, flops_per_cycle=524288, matrix_width=256),
}
"""Limits by the chip names of `paged_kernels._src.tpu.chip`. v4 is missing, because the compiler cannot cost it."""


def chip_named(name: str) -> Chip:
    """Returns the chip of this name."""
    return next(chip for chip in CHIPS if chip.name == name)


def bytes_per_cycle(name: str) -> float:
    """Returns the bytes that HBM can deliver per cycle.

    >>> round(bytes_per_cycle("v5e")), round(bytes_per_cycle("v6e"))
    (547, 937)
    """
    return chip_named(name).hbm_bandwidth / LIMITS[name].clock


def memory_limit(name: str, size: int) -> float:
    """Returns the cycles that `size` bytes take at HBM's full bandwidth."""
    return size / bytes_per_cycle(name)


def matrix_limit(name: str, flops: int) -> float:
    """Returns the cycles that `flops` operations take if all matrix units are busy."""
    return flops / LIMITS[name].flops_per_cycle


def versions() -> dict[str, str]:
    """Returns the versions of jax and libtpu, on which the figures depend."""
    return {name: _version(name) for name in ("jax", "libtpu")}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
