"""Which pages are free, how many owners the others have, and which free ones are worth keeping."""

from collections import OrderedDict

import numpy as np
from numpy.typing import ArrayLike


class OutOfPages(RuntimeError):  # noqa: N818 - a condition that a scheduler waits out, named for what it says
    """More pages were asked for than are free; nothing was taken."""

    def __init__(self, asked: int, free: int, where: str = "") -> None:
        super().__init__(
            f"asked for {asked} {where}pages, but {free} are free; release some, wait until a sequence ends, or raise "
            f"num_{where.replace(' ', '_')}pages"
        )
        self.asked = asked
        self.free = free


class PagePool:
    """Hands out page ids `1 .. num_pages - 1` and takes them back; page 0 is the null page, never handed out.

    Each page counts its owners. A page without any is free: empty, or kept for what it holds. Empty pages go out first,
    then kept ones, the least recently released first. At any time

        num_empty + num_cached + num_used == num_pages - 1

    A call costs O(1) for each page that it names, however large the pool, and does all it was asked or raises and
    changes nothing.

    >>> pool = PagePool(num_pages=4)
    >>> pages = pool.allocate(2)
    >>> pool.share(pages)
    >>> pool.release(pages)  # the pages that are empty now
    array([], dtype=int32)
    >>> pool.release(pages)
    array([1, 2], dtype=int32)
    >>> pool.num_free
    3
    """

    def __init__(self, num_pages: int, where: str = "") -> None:
        """A pool whose pages are all empty.

        Args:
            num_pages: pages, the null page included.
            where: a word for error messages, such as "host ".

        Raises:
            ValueError: there is not even the null page.
        """
        if num_pages < 1:
            raise ValueError(f"num_pages={num_pages} must be at least 1: page 0 is the null page, never handed out")
        self._where = where
        self._refcounts = np.zeros(num_pages, np.int32)
        self._empty = np.arange(num_pages - 1, 0, -1, dtype=np.int32)  # a stack: page 1 goes out first
        self._num_empty = num_pages - 1
        self._cached: OrderedDict[int, None] = OrderedDict()  # a queue, from whose middle pages can be taken

    @property
    def num_pages(self) -> int:
        """Number of pages, the null page included."""
        return len(self._refcounts)

    @property
    def num_empty(self) -> int:
        """Free pages that hold nothing."""
        return self._num_empty

    @property
    def num_cached(self) -> int:
        """Free pages that are kept for what they hold."""
        return len(self._cached)

    @property
    def num_free(self) -> int:
        """Pages that can be allocated now: the empty and the kept ones."""
        return self._num_empty + len(self._cached)

    @property
    def num_used(self) -> int:
        """Pages with at least one owner."""
        return len(self._refcounts) - 1 - self._num_empty - len(self._cached)

    def refcounts(self, pages: ArrayLike) -> np.ndarray:
        """How many owners each page has, 0 when it is free."""
        return self._refcounts[np.asarray(pages)]

    def allocate(self, n: int) -> np.ndarray:
        """`n` free pages, now with one owner each: the empty ones come first, then the kept, whose content is lost.

        Raises:
            OutOfPages: fewer are free; none is taken.
            ValueError: `n` is negative.
        """
        if n < 0:
            raise ValueError(f"n={n} must not be negative")
        if n > self.num_free:
            raise OutOfPages(asked=n, free=self.num_free, where=self._where)
        left = max(0, self._num_empty - n)
        pages = self._empty[left : self._num_empty][::-1].copy()
        kept = [self._cached.popitem(last=False)[0] for _ in range(n - len(pages))]
        pages = np.append(pages, kept).astype(np.int32) if kept else pages
        self._num_empty = left
        self._refcounts[pages] = 1
        return pages

    def share(self, pages: np.ndarray, times: int = 1) -> None:
        """`times` more owners for each of these pages; a kept one is free no longer.

        Raises:
            ValueError: a page does not exist, or has no owner and is not kept; no count changes.
        """
        self._check_ids(pages)
        free = pages[self._refcounts[pages] == 0].tolist()
        for page in free:
            if page not in self._cached:
                raise ValueError(f"page {page} has a refcount of 0 and is not cached, so it cannot be shared")
        for page in free:
            self._cached.pop(page, None)
        np.add.at(self._refcounts, pages, times)

    def release(self, pages: np.ndarray, keep: np.ndarray | None = None) -> np.ndarray:
        """One owner less for each of these pages (as often as each is named); returns those that are empty now.

        Args:
            pages: the pages; name the last of a sequence first, since a prefix is of no use without its start.
            keep: for every page of the pool whether it is kept when its last owner leaves; `None` keeps none.

        Raises:
            ValueError: a page does not exist, or has fewer owners than would be released; no count changes.
        """
        self._check_ids(pages)
        np.subtract.at(self._refcounts, pages, 1)
        left = self._refcounts[pages]
        if len(left) and left.min() < 0:
            np.add.at(self._refcounts, pages, 1)
            page = int(pages[left.argmin()])
            raise ValueError(
                f"page {page} has a refcount of {self._refcounts[page]}, but would be released more often; release "
                "once for each allocate or share"
            )
        freed = _without_repeats(pages[left == 0])
        kept = np.zeros(len(freed), bool) if keep is None else keep[freed]
        self._cached.update(dict.fromkeys(freed[kept].tolist()))
        empty = freed[~kept]
        self._push(empty)
        return empty

    def drop(self, pages: np.ndarray) -> None:
        """Kept pages become empty.

        Raises:
            ValueError: a page is not kept; none is dropped.
        """
        for page in pages.tolist():
            if page not in self._cached:
                raise ValueError(f"page {page} is not kept, so it cannot be dropped; release it, or leave it out")
        for page in pages.tolist():
            self._cached.pop(page, None)
        self._push(_without_repeats(pages))

    def _push(self, pages: np.ndarray) -> None:
        self._empty[self._num_empty : self._num_empty + len(pages)] = pages
        self._num_empty += len(pages)

    def _check_ids(self, pages: np.ndarray) -> None:
        if len(pages) and not (pages.min() >= 1 and pages.max() < self.num_pages):
            wrong = pages[(pages < 1) | (pages >= self.num_pages)][0]
            raise ValueError(f"page {wrong} must lie in 1..{self.num_pages - 1} (page 0 is the null page)")


def _without_repeats(pages: np.ndarray) -> np.ndarray:
    """Each page once, in the order of their first places."""
    return np.fromiter(dict.fromkeys(pages.tolist()), np.int32)
