"""A device made of integers: the number in a slot identifies everything that was written there."""

from collections.abc import Hashable, Iterable

import numpy as np

EMPTY = 0  # zeros
POISON = -1  # must never be read


class Contents:
    """Numbers for the prefixes of texts: equal numbers mean equal prefixes.

    What a model stores for a token depends on every token before it, on the adapter and on the pictures among them; and
    nobody of another namespace may see it. So the content of a position is the chain

        content[p] = number(content[p - 1], token[p] and the picture that starts there)
        content[-1] = number(namespace, adapter)

    A group of layers stores something of its own: the number of a slot is `content * num_groups + group`.
    """

    def __init__(self, num_groups: int) -> None:
        self.num_groups = num_groups
        self._numbers: dict[Hashable, int] = {}
        self._namespaces: list[str | None] = [None]  # of each number
        self.before: dict[int, int] = {}
        """The number of the text without its last token."""
        self.token: dict[int, Hashable] = {}
        """The last token."""

    def root(self, kind: str, namespace: str, *more: Hashable) -> int:
        """The number of an empty text of a namespace."""
        return self._number((kind, namespace, *more), namespace)

    def after(self, content: int, token: Hashable) -> int:
        """The number of a text that is one token longer."""
        number = self._number((content, token), self._namespaces[content])
        self.before[number], self.token[number] = content, token
        return number

    def chain(self, content: int, tokens: Iterable[Hashable]) -> list[int]:
        """The numbers of a text that goes on with these tokens, one each."""
        numbers = []
        for token in tokens:
            content = self.after(content, token)
            numbers.append(content)
        return numbers

    def cells(self, contents: list[int], group: int) -> np.ndarray:
        """What a group's slots hold at positions of these contents."""
        return np.asarray(contents, np.int64) * self.num_groups + group

    def namespaces(self, cells: np.ndarray) -> set[str | None]:
        """Whose texts these slots hold; `None` for an empty one."""
        return {self._namespaces[max(0, cell) // self.num_groups] for cell in cells.ravel().tolist()}

    def _number(self, what: Hashable, namespace: str | None) -> int:
        number = self._numbers.setdefault(what, len(self._namespaces))
        if number == len(self._namespaces):
            self._namespaces.append(namespace)
        return number


class SimulatedDevice:
    """Pages on the device and on the host, which do what `PageMoves` and page tables say.

    Attributes:
        pages: `[num_pages, page_size]`, the number in each slot.
        host: `[num_host_pages, page_size]`, the same on the host.
    """

    def __init__(self, num_pages: int, page_size: int, num_host_pages: int) -> None:
        self.page_size = page_size
        self.pages = np.full((num_pages, page_size), EMPTY, np.int64)
        self.pages[0] = POISON
        self.host = np.full((num_host_pages, page_size), POISON, np.int64)

    def copy(self) -> "SimulatedDevice":
        """Another device with the same content."""
        twin = SimulatedDevice(len(self.pages), self.page_size, len(self.host))
        twin.pages[:], twin.host[:] = self.pages, self.host
        return twin

    def apply(self, phases) -> None:
        """Carry out the phases in order; in each, all reads come before all writes."""
        for moves in phases:
            self._check_phase(moves)
            copied, taken_out, brought_in = (
                self.pages[moves.copy_from],
                self.pages[moves.out_from],
                self.host[moves.in_from],
            )
            self.pages[moves.copy_to] = copied
            self.pages[moves.zero] = EMPTY
            self.pages[moves.in_to] = brought_in
            self.host[moves.out_to] = taken_out

    def _check_phase(self, moves) -> None:
        for sources, targets in (("copy_from", "copy_to"), ("out_from", "out_to"), ("in_from", "in_to")):
            assert getattr(moves, sources).shape == getattr(moves, targets).shape, f"{sources} without {targets}"
        on_device = np.concatenate([moves.copy_to, moves.zero, moves.in_to])
        for name, written, pages, first in (
            ("device", on_device, self.pages, 1),
            ("host", moves.out_to, self.host, 0),
        ):
            assert len(set(written.tolist())) == len(written), f"{name} pages {written} are written twice in a phase"
            assert all(first <= page < len(pages) for page in written), f"{name} pages {written} cannot all be written"
        read = np.concatenate([moves.copy_from, moves.out_from])
        assert all(1 <= page < len(self.pages) for page in read), f"pages {read} cannot all be read"
        assert all(0 <= page < len(self.host) for page in moves.in_from), f"host pages {moves.in_from} cannot be read"

    def write(self, table: np.ndarray, start: int, cells: np.ndarray, refcounts: np.ndarray) -> None:
        """Write the slots from position `start` on through a page table.

        Args:
            table: `[pages_per_seq]` page ids.
            start: first position.
            cells: the numbers to write, one a position.
            refcounts: `[num_pages]` the refcounts: a page that is written has refcount 1.
        """
        pages, slots = self._places(table, start, len(cells))
        assert (pages > 0).all(), f"positions {start}.. of table {table} have no page to write"
        assert (refcounts[pages] == 1).all(), f"pages {pages} are written, but have {refcounts[pages]} refcounts"
        self.pages[pages, slots] = cells

    def read(self, table: np.ndarray, start: int, end: int) -> np.ndarray:
        """The numbers at positions `start : end` of a page table."""
        return self.pages[self._places(table, start, end - start)]

    def _places(self, table: np.ndarray, start: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        positions = np.arange(start, start + n)
        return table[positions // self.page_size], positions % self.page_size
