"""The pages of a device: who owns them, what they hold, and what is to be done to them."""

from collections.abc import Sequence

import numpy as np

from paged_cache._src.manager.events import EventKind, PageEvent, Subscriber
from paged_cache._src.manager.moves import MoveLog, PageMoves
from paged_cache._src.manager.pool import PagePool
from paged_cache._src.manager.prefix import Content, PrefixIndex
from paged_cache._src.manager.stats import Counts


class Pages:
    """A pool, an index of what its pages hold, and a log of moves, kept in step. Knows nothing of sequences.

    empty --allocate--> owned --release--> kept --share--> owned
      ^                   |                  |
      +------release------+      allocate: evicted, and owned by another
    """

    def __init__(self, num_pages: int, num_groups: int, *, scrub: bool) -> None:
        """Empty pages; with `scrub`, pages are filled with zeros as soon as their content is lost.

        Raises:
            ValueError: there is no page to hand out.
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
        """`n` pages of one owner; kept ones are evicted where empty ones do not suffice.

        Raises:
            OutOfPages: fewer are free; nothing changes.
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
        """`times` more owners for each page; those that were kept are free no longer."""
        self.pool.share(pages, times)

    def release(self, pages: np.ndarray) -> None:
        """One owner less for each page; what can be found is kept when its last owner has left."""
        self._zero(self.pool.release(pages, keep=self.index.is_indexed))

    def add_to_index(self, group: int, pages: np.ndarray, contents: Sequence[Content]) -> None:
        """Let full pages be found by what they hold, those excepted for which another is found by the same."""
        self._add_events("stored", self.index.add(group, pages.tolist(), contents))

    def add_partial_to_index(self, group: int, page: int, content: Content) -> None:
        """Let a page be found by what it begins with, unless another begins alike."""
        self._add_events("stored", self.index.add_partial(group, page, content))

    def remove_from_index(self, pages: np.ndarray) -> None:
        """Owned pages that are written again can be found no longer."""
        self._remove_from_index(pages, "removed")

    def clear_index(self) -> None:
        """Nothing can be found any more."""
        found = np.array([content.page for content in self.index.cached_pages()], np.int32)
        self._remove_from_index(found, "removed")
        free = found[self.pool.refcounts(found) == 0]
        self.pool.drop(free)
        self._zero(free)

    def copy(self, sources: np.ndarray, targets: np.ndarray) -> None:
        """The device is to copy pages."""
        self.log.add("copy", sources, targets)
        self.counts.copies += len(targets)

    def add_swap_events(self, kind: EventKind, pages: np.ndarray, group: int) -> None:
        """Tell subscribers of pages that were swapped."""
        if self._subscribers:
            self._events += [PageEvent(kind, page, group, b"") for page in pages.tolist()]

    def subscribe(self, subscriber: Subscriber) -> None:
        """Tell `subscriber` of all that `publish` publishes."""
        self._subscribers.append(subscriber)

    def publish(self) -> None:
        """An operation is complete: note how many pages have owners, and tell subscribers what happened."""
        num_used = self.pool.num_used
        self.counts.peak_used = max(self.counts.peak_used, num_used)
        if self._events:
            events, self._events = self._events, []
            for subscriber in self._subscribers:
                subscriber(events)

    def take_moves(self) -> list[PageMoves]:
        """The moves since the last call."""
        return self.log.take()

    def _remove_from_index(self, pages: np.ndarray, kind: EventKind) -> None:
        """Pages can be found no longer; those that could not are passed over."""
        found = list(dict.fromkeys(pages[self.index.is_indexed[pages]].tolist()))
        self._add_events(kind, found)
        self.index.remove(found)

    def _add_events(self, kind: EventKind, found: list[int]) -> None:
        """Something happened to pages that can be found, and is to be published."""
        if self._subscribers:
            self._events += [PageEvent(kind, page, *self.index.group_and_hash(page)) for page in found]

    def _zero(self, pages: np.ndarray) -> None:
        if self._scrub:
            self.log.add("zero", pages[:0], pages)
