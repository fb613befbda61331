"""The pool of pages: refcounts, empty pages, and an LRU queue of cached pages."""

from collections import OrderedDict

import numpy as np
from numpy.typing import ArrayLike


class OutOfPages(RuntimeError):  # noqa: N818 - a state to wait for, not a fault
    """Fewer pages are free than were asked for. Nothing was allocated."""

    def __init__(self, asked: int, free: int, where: str = "") -> None:
        super().__init__(
            f"asked for {asked} {where}pages, but {free} are free; release some, wait until a sequence ends, or raise "
            f"num_{where.replace(' ', '_')}pages"
        )
        self.asked = asked
        self.free = free


class PagePool:
    """Allocates and frees the page ids `1 .. num_pages - 1`. Page 0 is the null page and is never allocated.

    Each page has a refcount. A page is in one of three states:

        in use  | refcount of at least 1
        cached  | refcount 0, content in the prefix index; can be shared again, or evicted
        empty   | refcount 0, no content that anyone can use

    `allocate` takes empty pages first. Then it evicts cached pages, the least recently released first. Always:

        num_used + num_cached + num_empty == num_pages - 1

    Each call costs O(1) per page that it names, whatever the size of the pool. A call that raises changes nothing.

    >>> pool = PagePool(num_pages=4)
    >>> pages = pool.allocate(2)
    >>> pool.share(pages)
    >>> pool.release(pages)  # still in use
    array([], dtype=int32)
    >>> pool.release(pages)
    array([1, 2], dtype=int32)
    >>> pool.num_free
    3
    """

    def __init__(self, num_pages: int, where: str = "") -> None:
        """Create a pool of empty pages.

        Args:
            num_pages: number of pages, including the null page.
            where: a word for error messages, such as "host ".

        Raises:
            ValueError: `num_pages` is below 1.
        """
        if num_pages < 1:
            raise ValueError(f"num_pages={num_pages} must be at least 1: page 0 is the null page, never handed out")
        self._where = where
        self._refcounts = np.zeros(num_pages, np.int32)
        self._empty = np.arange(num_pages - 1, 0, -1, dtype=np.int32)  # a stack; page 1 is on top
        self._num_empty = num_pages - 1
        self._cached: OrderedDict[int, None] = OrderedDict()  # LRU order; a dict to remove from the middle

    @property
    def num_pages(self) -> int:
        """Number of pages, including the null page."""
        return len(self._refcounts)

    @property
    def num_empty(self) -> int:
        """Number of empty pages."""
        return self._num_empty

    @property
    def num_cached(self) -> int:
        """Number of cached pages: free, with content that is in the prefix index."""
        return len(self._cached)

    @property
    def num_free(self) -> int:
        """Number of pages that can be allocated now: empty and cached pages."""
        return self._num_empty + len(self._cached)

    @property
    def num_used(self) -> int:
        """Number of pages in use: refcount of at least 1."""
        return len(self._refcounts) - 1 - self._num_empty - len(self._cached)

    def refcounts(self, pages: ArrayLike) -> np.ndarray:
        """The refcount of each page; 0 for a free page."""
        return self._refcounts[np.asarray(pages)]

    def allocate(self, n: int) -> np.ndarray:
        """Allocate `n` pages with refcount 1: empty pages first, then evicted ones.

        Raises:
            OutOfPages: fewer than `n` pages are free.
            ValueError: `n` is negative.
        """
        if n < 0:
            raise ValueError(f"n={n} must not be negative")
        if n > self.num_free:
            raise OutOfPages(asked=n, free=self.num_free, where=self._where)
        left = max(0, self._num_empty - n)
        pages = self._empty[left : self._num_empty][::-1].copy()
        evicted = [self._cached.popitem(last=False)[0] for _ in range(n - len(pages))]
        pages = np.append(pages, evicted).astype(np.int32) if evicted else pages
        self._num_empty = left
        self._refcounts[pages] = 1
        return pages

    def share(self, pages: np.ndarray, times: int = 1) -> None:
        """Add `times` to the refcount of each page. Cached pages are in use again.

        Raises:
            ValueError: a page does not exist, or is empty.
        """
        self._check_ids(pages)
        free = pages[self._refcounts[pages] == 0].tolist()
        for page in free:
            if page not in self._cached:
                raise ValueError(f"page {page} has a refcount of 0 and is not cached, so it cannot be shared")
        for page in free:
            self._cached.pop(page, None)
        np.add.at(self._refcounts, pages, times)

    def release(self, pages: np.ndarray, is_indexed: np.ndarray | None = None) -> np.ndarray:
        """Subtract 1 from the refcount of each page, once per mention. Returns the pages that became empty.

        Args:
            pages: page ids, the end of a sequence first. Pages named first are evicted first, and a prefix is useless
                without its start.
            is_indexed: for each page of the pool, True if it becomes cached at refcount 0; `None`: all become empty.

        Raises:
            ValueError: a page does not exist, or is named more often than its refcount.
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
        cached = np.zeros(len(freed), bool) if is_indexed is None else is_indexed[freed]
        self._cached.update(dict.fromkeys(freed[cached].tolist()))
        empty = freed[~cached]
        self._push(empty)
        return empty

    def drop_cached(self, pages: np.ndarray) -> None:
        """Turn cached pages into empty ones.

        Raises:
            ValueError: a page is not cached.
        """
        for page in pages.tolist():
            if page not in self._cached:
                raise ValueError(f"page {page} is not cached, so it cannot be dropped; release it, or leave it out")
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
    """Remove repeated pages; the first mention of each stays."""
    return np.fromiter(dict.fromkeys(pages.tolist()), np.int32)
