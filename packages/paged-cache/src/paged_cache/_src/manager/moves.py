"""What the device must do to its pages before the next step: copy, zero, swap out, swap in."""

import dataclasses
from typing import Literal

import numpy as np

Verb = Literal["copy", "zero", "out", "in"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PageMoves:
    """Moves of one phase, int32 page ids. All pages are read before any is written, so their order does not matter.

    Page ids are the same for all layers; a move is of a page in every layer.
    """

    copy_from: np.ndarray
    copy_to: np.ndarray
    """Device pages that take the content of `copy_from`."""
    zero: np.ndarray
    """Device pages that are filled with zeros."""
    out_from: np.ndarray
    out_to: np.ndarray
    """Host pages that take the content of device pages `out_from`."""
    in_from: np.ndarray
    in_to: np.ndarray
    """Device pages that take the content of host pages `in_from`."""


class MoveLog:
    """Moves in the order in which they were decided, cut into phases when they are taken."""

    def __init__(self) -> None:
        self._moves: list[tuple[Verb, np.ndarray, np.ndarray]] = []

    def add(self, verb: Verb, source: np.ndarray, target: np.ndarray) -> None:
        """Note moves from `source` to `target`, which is one of distinct pages; `zero` has no source."""
        if len(target):
            self._moves.append((verb, source, target))

    def take(self) -> list[PageMoves]:
        """The phases that do, one after the other, what all moves since the last call do in their order."""
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
    """What a move reads and what it writes, host pages apart from device pages."""
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
