"""Which pages are free, how many owners each of the others has, and which content can be found again."""

from collections import Counter, OrderedDict
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

    Each page counts its owners, so that sequences can share a prefix. A page whose content was named by `keep` can be
    found by that key, also when its last owner has left: then it is free and waits at the end of the queue, and its
    content is forgotten only when it is handed out. So content is evicted, least recently used first, when pages are
    needed and not before. Every call costs O(1) a page, and either does all it was asked or raises and changes
    nothing. At any time `num_free + num_used == num_pages - 1`.

    >>> pool = PagePool(num_pages=4)
    >>> pages = pool.allocate(2)
    >>> pool.share(pages)
    >>> pool.release(pages), pool.num_free
    (None, 1)
    >>> pool.keep(pages[0], b"what it holds")
    >>> pool.release(pages), pool.num_free
    (None, 3)
    >>> pool.find(b"what it holds") == pages[0]
    True
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 2:
            raise ValueError(f"num_pages={num_pages} must be at least 2: page 0 is the null page, never handed out")
        self._ref_counts = [0] * num_pages
        self._free = OrderedDict.fromkeys(range(1, num_pages))  # a queue, from whose middle pages can be taken
        self._keys: dict[int, bytes] = {}  # of the pages whose content can be found
        self._pages: dict[bytes, int] = {}  # the same, the other way round

    @property
    def num_pages(self) -> int:
        """Number of pages, the null page included."""
        return len(self._ref_counts)

    @property
    def num_free(self) -> int:
        """Pages that can be allocated now, those whose content can still be found among them."""
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
        """`n` free pages, now with one owner each; what they held is forgotten, the least recently used first.

        Raises:
            OutOfPages: fewer are free; none is taken.
            ValueError: `n` is negative.
        """
        if n < 0:
            raise ValueError(f"n={n} must not be negative")
        if n > self.num_free:
            raise OutOfPages(asked=n, free=self.num_free)
        pages = [self._free.popitem(last=False)[0] for _ in range(n)]
        for page in pages:
            self._ref_counts[page] = 1
            if page in self._keys:
                del self._pages[self._keys.pop(page)]
        return pages

    def keep(self, page_id: int, key: bytes) -> None:
        """Let the content of a page be found by this key until the page is handed out again.

        The page must not be written any more. If the key already names another page, that one stays the one found.

        Raises:
            ValueError: there is no such page, it has no owner, or it is kept under another key; nothing changes.
        """
        self._check_owned(page_id, times=1, doing="kept")
        if self._keys.get(page_id, key) != key:
            raise ValueError(f"page {page_id} is kept under another key; a page that is kept must not be written again")
        if self._pages.setdefault(key, page_id) == page_id:
            self._keys[page_id] = key

    def find(self, key: bytes) -> int | None:
        """The page that holds the content of this name, owned or free; `share` it before anything else is allocated."""
        return self._pages.get(key)

    def share(self, page_ids: Iterable[int]) -> None:
        """One more owner for each of these pages (as often as each is named); a free one is taken out of the queue.

        Raises:
            ValueError: a page does not exist, or has no owner and no content that could be found; no count changes.
        """
        named = Counter(page_ids)
        for page in named:
            if page not in self._keys:
                self._check_owned(page, times=1, doing="shared")
        for page, times in named.items():
            self._free.pop(page, None)
            self._ref_counts[page] += times

    def release(self, page_ids: Iterable[int]) -> None:
        """One owner less for each of these pages (as often as each is named); a page without any is free again.

        Free pages with content that can be found queue up at the end, in the order given; name the last of a sequence
        first, since a prefix is of no use without its start. The others, with nothing to lose, go out first.

        Raises:
            ValueError: a page does not exist, or has fewer owners than would be released; no count changes.
        """
        named = Counter(page_ids)
        for page, times in named.items():
            self._check_owned(page, times, doing="released")
        for page, times in named.items():
            self._ref_counts[page] -= times
            if self._ref_counts[page] == 0:
                self._free[page] = None
                self._free.move_to_end(page, last=page in self._keys)

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
