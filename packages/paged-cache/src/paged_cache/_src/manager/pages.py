"""The pages of one device: refcounts, the prefix index, and the moves that the device must make."""

from collections.abc import Sequence

import numpy as np

from paged_cache._src.manager.events import EventKind, PageEvent, Subscriber
from paged_cache._src.manager.moves import MoveLog, PageMoves
from paged_cache._src.manager.pool import PagePool
from paged_cache._src.manager.prefix import Content, PrefixIndex
from paged_cache._src.manager.stats import Counts


class Pages:
    """A page pool, a prefix index and a log of moves that always agree. Knows pages, but no sequences.

    The life of a page:

        empty --- allocate ------------------> in use
        empty <-- release, if not indexed ---- in use --- release, if indexed --> cached
                                               in use <-- share (cache hit) ----- cached
                                               in use <-- allocate (eviction) --- cached
        empty <--------------------------- clear_index -------------------------- cached

    `release` changes the state only when the refcount reaches 0. A page in use may be indexed too: it is added to the
    index as soon as it is full.
    """

    def __init__(self, num_pages: int, num_groups: int, *, scrub: bool) -> None:
        """Create empty pages.

        Args:
            num_pages: number of pages, including the null page.
            num_groups: number of layer groups; each has an index of its own.
            scrub: True to fill a page with zeros as soon as its content is dropped.

        Raises:
            ValueError: `num_pages` is below 2.
        """
        if num_pages < 2:
            raise ValueError(f"num_pages={num_pages} must be at least 2: page 0 is the null page, never handed out")
        self.pool = PagePool(num_pages)
        self.index = PrefixIndex(num_groups, num_pages)
        self.counts = Counts()
        self.log = MoveLog()
        self._scrub = scrub
        self._subscribers: list[Subscriber] = []
        self._events: list[PageEvent] = []

    def allocate(self, n: int) -> np.ndarray:
        """Allocate `n` pages with refcount 1. Evicts cached pages if there are too few empty ones.

        Raises:
            OutOfPages: fewer than `n` pages are free; nothing changes.
        """
        num_evicted = max(0, n - self.pool.num_empty)
        pages = self.pool.allocate(n)
        if num_evicted:
            evicted = pages[n - num_evicted :]
            self._remove_from_index(evicted, "evicted")
            self._zero(evicted)
            self.counts.evictions += num_evicted
        return pages

    def share(self, pages: np.ndarray, times: int = 1) -> None:
        """Add `times` to the refcount of each page. Cached pages are in use again."""
        self.pool.share(pages, times)

    def release(self, pages: np.ndarray) -> None:
        """Subtract 1 from the refcount of each page. At 0, an indexed page becomes cached and another one empty."""
        self._zero(self.pool.release(pages, self.index.is_indexed))

    def add_to_index(self, group: int, pages: np.ndarray, contents: Sequence[Content]) -> None:
        """Index full pages, skipping content that is already indexed."""
        self._add_events("stored", self.index.add(group, pages.tolist(), contents))

    def add_partial_to_index(self, group: int, page: int, content: Content) -> None:
        """Index a partial page, unless its tokens are already indexed."""
        self._add_events("stored", self.index.add_partial(group, page, content))

    def remove_from_index(self, pages: np.ndarray) -> None:
        """Drop pages in use from the index, because they will be written again."""
        self._remove_from_index(pages, "removed")

    def clear_index(self) -> None:
        """Drop all pages from the index. Cached pages become empty."""
        indexed = np.array([cached.page for cached in self.index.indexed_pages()], np.int32)
        self._remove_from_index(indexed, "removed")
        free = indexed[self.pool.refcounts(indexed) == 0]
        self.pool.drop_cached(free)
        self._zero(free)

    def copy(self, sources: np.ndarray, targets: np.ndarray) -> None:
        """Log copies of pages for the device."""
        self.log.add("copy", sources, targets)
        self.counts.copies += len(targets)

    def add_swap_events(self, kind: EventKind, pages: np.ndarray, group: int) -> None:
        """Add an event for each page that was swapped."""
        if self._subscribers:
            self._events += [PageEvent(kind, page, group, b"") for page in pages.tolist()]

    def subscribe(self, subscriber: Subscriber) -> None:
        """Register a function that `publish` calls."""
        self._subscribers.append(subscriber)

    def publish(self) -> None:
        """End an operation: update the peak of pages in use, and send the operation's events to subscribers."""
        num_used = self.pool.num_used
        self.counts.peak_used = max(self.counts.peak_used, num_used)
        if self._events:
            events, self._events = self._events, []
            for subscriber in self._subscribers:
                subscriber(events)

    def take_moves(self) -> list[PageMoves]:
        """Return the moves since the last call, and clear the log."""
        return self.log.take()

    def _remove_from_index(self, pages: np.ndarray, kind: EventKind) -> None:
        """Drop those of the pages that are indexed, with an event for each."""
        indexed = list(dict.fromkeys(pages[self.index.is_indexed[pages]].tolist()))
        self._add_events(kind, indexed)
        self.index.remove(indexed)

    def _add_events(self, kind: EventKind, pages: list[int]) -> None:
        """Add an event for each of these indexed pages."""
        if self._subscribers:
            self._events += [PageEvent(kind, page, *self.index.group_and_hash(page)) for page in pages]

    def _zero(self, pages: np.ndarray) -> None:
        """Log zeroing of pages for the device, if `scrub` is set."""
        if self._scrub:
            self.log.add("zero", pages[:0], pages)
