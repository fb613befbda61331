"""The collectives of a compiled program, read from its HLO text."""

import collections
import math
import re
from typing import NamedTuple

_KINDS = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
_OPERATION = re.compile(rf"^.* = (.*?) ({_KINDS})(?:-start)?\(.*$", re.MULTILINE)
_SHAPE = re.compile(r"\b([a-z]+\d+)\w*\[([\d,]*)\]")
_SOURCE = re.compile(r'op_name="([^"]*)"')


class Collective(NamedTuple):
    """One collective. A loop's counts once."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    """Shapes of its results on one device."""
    num_bytes: int
    """Bytes of its results on one device."""
    source: str
    """The operation of the model that it belongs to, as jax names it."""


def read_collectives(hlo: str) -> list[Collective]:
    """Returns the collectives of a program, in its order.

    >>> read_collectives('%r.1 = bf16[8,64]{1,0} all-reduce(%dot), metadata={op_name="jit(step)/dot_general"}')
    [Collective(kind='all-reduce', shapes=((8, 64),), num_bytes=1024, source='jit(step)/dot_general')]
    """
    found = []
    for line in _OPERATION.finditer(hlo):
        arrays = [
            (_bits(name), tuple(map(int, filter(None, sizes.split(","))))) for name, sizes in _SHAPE.findall(line[1])
        ]
        num_bytes = sum(bits * math.prod(shape) for bits, shape in arrays) // 8
        source = _SOURCE.search(line[0])
        found.append(Collective(line[2], tuple(shape for _, shape in arrays), num_bytes, source[1] if source else ""))
    return found


def by_kind(found: list[Collective]) -> dict[str, tuple[int, int]]:
    """Returns how many collectives there are of each kind, and their bytes."""
    counts = collections.Counter(each.kind for each in found)
    return {kind: (count, sum(each.num_bytes for each in found if each.kind == kind)) for kind, count in counts.items()}


def _bits(dtype: str) -> int:
    return int(re.sub(r"\D", "", dtype))


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(",") if size)
