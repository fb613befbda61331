"""What the hardware could do at best, per cycle: the limits that the figures are held against."""

import dataclasses
from importlib.metadata import PackageNotFoundError, version

from paged_kernels._src.tpu.chip import CHIPS, Chip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """One core's clock and matrix units.

    `clock` is Google's peak of bfloat16 operations a second (half a chip's where it has two cores) over
    `flops_per_cycle`: v5e 197e12, v5p 459e12 / 2, v6e 918e12, tpu7x 2307e12 / 2.
    """

    topology: str
    """The smallest slice that libtpu describes."""
    clock: float
    """Cycles a second."""
    flops_per_cycle: int
    """bfloat16 operations of all matrix units in a cycle."""
    matrix_width: int
    """Rows and columns of a matrix unit's tile: a head of half that size leaves half of it idle."""


LIMITS = {
    "v5e": Limits(topology="v5e:2x2", clock=1.50e9, flops_per_cycle=131072, matrix_width=128),
    "v5p": Limits(topology="v5p:2x2x1", clock=1.75e9, flops_per_cycle=131072, matrix_width=128),
    "v6e": Limits(topology="v6e:2x2", clock=1.75e9, flops_per_cycle=524288, matrix_width=256),
    "tpu7x": Limits(topology="tpu7x:2x2x1", clock=2.20e9, flops_per_cycle=524288, matrix_width=256),
}
"""By the names of `paged_kernels._src.tpu.chip`. v4 is missing: the compiler has no such cost model for it."""


def chip_named(name: str) -> Chip:
    """The chip of this name."""
    return next(chip for chip in CHIPS if chip.name == name)


def bytes_per_cycle(name: str) -> float:
    """Bytes that HBM can deliver in a cycle.

    >>> round(bytes_per_cycle("v5e")), round(bytes_per_cycle("v6e"))
    (547, 937)
    """
    return chip_named(name).hbm_bandwidth / LIMITS[name].clock


def memory_limit(name: str, size: int) -> float:
    """Cycles that so many bytes take at HBM's full bandwidth."""
    return size / bytes_per_cycle(name)


def matrix_limit(name: str, flops: int) -> float:
    """Cycles that so many operations take with every matrix unit busy."""
    return flops / LIMITS[name].flops_per_cycle


def versions() -> dict[str, str]:
    """The versions that figures depend on."""
    return {name: _version(name) for name in ("jax", "libtpu")}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
