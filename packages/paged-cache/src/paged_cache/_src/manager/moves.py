"""Page moves: what the device must do before the next step. Copy, zero, swap out, swap in."""

import dataclasses
from typing import Literal

import numpy as np

Verb = Literal["copy", "zero", "out", "in"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PageMoves:
    """The moves of one phase, as int32 page ids. All reads of a phase come before its writes, so order is free.

    A move applies to the page in every layer.
    """

    copy_from: np.ndarray
    copy_to: np.ndarray
    """Device pages that receive the content of device pages `copy_from`."""
    zero: np.ndarray
    """Device pages to fill with zeros."""
    out_from: np.ndarray
    out_to: np.ndarray
    """Host pages that receive the content of device pages `out_from`."""
    in_from: np.ndarray
    in_to: np.ndarray
    """Device pages that receive the content of host pages `in_from`."""


class MoveLog:
    """A list of moves in order. `take` splits it into phases."""

    def __init__(self) -> None:
        self._moves: list[tuple[Verb, np.ndarray, np.ndarray]] = []

    def add(self, verb: Verb, source: np.ndarray, target: np.ndarray) -> None:
        """Add moves from `source` to `target`, an array of distinct pages. For `zero`, `source` is empty."""
        if len(target):
            self._moves.append((verb, source, target))

    def take(self) -> list[PageMoves]:
        """Return the moves since the last call as phases. A new phase starts where a page was written before."""
        moves, self._moves = self._moves, []
        phases, written = [], set()
        for verb, source, target in moves:
            reads, writes = _places(verb, source, target)
            if not phases or not written.isdisjoint(reads | writes):
                phases.append({"copy": [], "zero": [], "out": [], "in": []})
                written = set()
            phases[-1][verb].append((source, target))
            written |= writes
        return [_phase(each) for each in phases]


def _places(verb: Verb, source: np.ndarray, target: np.ndarray) -> tuple[set[tuple[str, int]], set[tuple[str, int]]]:
    """The pages that a move reads and those that it writes, as `(memory, page)`."""
    reads = {("host" if verb == "in" else "device", page) for page in source.tolist()}
    writes = {("host" if verb == "out" else "device", page) for page in target.tolist()}
    return reads, writes


def _phase(moves: dict[Verb, list[tuple[np.ndarray, np.ndarray]]]) -> PageMoves:
    def sources(verb: Verb) -> np.ndarray:
        return np.concatenate([np.empty(0, np.int32), *(source for source, _ in moves[verb])])

    def targets(verb: Verb) -> np.ndarray:
        return np.concatenate([np.empty(0, np.int32), *(target for _, target in moves[verb])])

    return PageMoves(
        copy_from=sources("copy"),
        copy_to=targets("copy"),
        zero=targets("zero"),
        out_from=sources("out"),
        out_to=targets("out"),
        in_from=sources("in"),
        in_to=targets("in"),
    )
