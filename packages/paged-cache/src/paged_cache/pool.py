"""Which pages are free, and how many owners each of the others has."""

from collections import Counter
from collections.abc import Iterable


class OutOfPages(RuntimeError):  # noqa: N818 - a condition that a scheduler waits out, named for what it says
    """More pages were asked for than are free; nothing was taken."""

    def __init__(self, asked: int, free: int) -> None:
        super().__init__(
            f"asked for {asked} pages, but {free} are free; release some, wait until a sequence ends, or make the "
            "cache larger"
        )
        self.asked = asked
        self.free = free


class PagePool:
    """Hands out page ids `1 .. num_pages - 1` and takes them back; page 0 is the null page, never handed out.

    Each page counts its owners, so that sequences can share a prefix. Every call costs O(1) a page, and either does
    all it was asked or raises and changes nothing. At any time `num_free + num_used == num_pages - 1`.

    >>> pool = PagePool(num_pages=4)
    >>> pages = pool.allocate(2)
    >>> pool.share(pages)
    >>> pool.release(pages), pool.num_free
    (None, 1)
    >>> pool.release(pages), pool.num_free
    (None, 3)
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 2:
            raise ValueError(f"num_pages={num_pages} must be at least 2: page 0 is the null page, never handed out")
        self._ref_counts = [0] * num_pages
        self._free = list(range(num_pages - 1, 0, -1))  # a stack: the page freed last, still warm, goes out first

    @property
    def num_pages(self) -> int:
        """Number of pages, the null page included."""
        return len(self._ref_counts)

    @property
    def num_free(self) -> int:
        """Pages that can be allocated now."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages with at least one owner."""
        return self.num_pages - 1 - self.num_free

    def ref_count(self, page_id: int) -> int:
        """How many owners a page has; 0 when it is free.

        Raises:
            ValueError: there is no such page.
        """
        self._check_id(page_id)
        return self._ref_counts[page_id]

    def allocate(self, n: int) -> list[int]:
        """`n` free pages, now with one owner each.

        Raises:
            OutOfPages: fewer are free; none is taken.
            ValueError: `n` is negative.
        """
        if n < 0:
            raise ValueError(f"n={n} must not be negative")
        if n > self.num_free:
            raise OutOfPages(asked=n, free=self.num_free)
        pages = [self._free.pop() for _ in range(n)]
        for page in pages:
            self._ref_counts[page] = 1
        return pages

    def share(self, page_ids: Iterable[int]) -> None:
        """One more owner for each of these pages (as often as each is named).

        Raises:
            ValueError: a page does not exist or is not allocated; no count changes.
        """
        named = Counter(page_ids)
        for page in named:
            self._check_owned(page, times=1, doing="shared")
        for page, times in named.items():
            self._ref_counts[page] += times

    def release(self, page_ids: Iterable[int]) -> None:
        """One owner less for each of these pages (as often as each is named); a page without any is free again.

        Raises:
            ValueError: a page does not exist, or has fewer owners than would be released; no count changes.
        """
        named = Counter(page_ids)
        for page, times in named.items():
            self._check_owned(page, times, doing="released")
        for page, times in named.items():
            self._ref_counts[page] -= times
            if self._ref_counts[page] == 0:
                self._free.append(page)

    def _check_owned(self, page: int, times: int, doing: str) -> None:
        self._check_id(page)
        if self._ref_counts[page] < times:
            raise ValueError(
                f"page {page} has {self._ref_counts[page]} owners and cannot be {doing} {times} times; "
                "each owner releases once what it allocated or shared"
            )

    def _check_id(self, page: int) -> None:
        if not 1 <= page < self.num_pages:
            raise ValueError(f"page {page} must lie in 1..{self.num_pages - 1} (page 0 is the null page)")
