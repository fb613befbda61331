"""The prefix index: finds the pages that hold a prompt's prefix, by a chain of sha256 hashes."""

import dataclasses
import hashlib
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

HASH_BYTES = hashlib.sha256().digest_size
PARTIAL_CANDIDATES = 8
"""The most pages that a partial lookup compares, the newest first. Keeps an operation O(pages)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Media:
    """A picture or a sound that the tokens `start : stop` stand for. Their token ids alone do not identify it.

    Raises:
        ValueError: `start : stop` is empty or negative, or `digest` is empty.
    """

    start: int
    stop: int
    digest: bytes
    """A cryptographic hash of the content, for instance its sha256."""

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"start={self.start}, stop={self.stop} must be in order: tokens start .. stop - 1")
        if not self.digest:
            raise ValueError("digest is empty; give a hash of the content, such as its sha256")


class IndexedPage(NamedTuple):
    """A page of the prefix index and its content: `token_ids`, which follow the prefix with hash `parent_hash`."""

    page: int
    group: int
    """Index of the layer group whose keys and values the page holds."""
    hash: bytes
    """`hash_page` of the content; empty for a partial page."""
    parent_hash: bytes
    """Hash of the page before this one; the root hash for the first page."""
    token_ids: bytes
    """The page's tokens as little-endian int32; less than a full page of them for a partial page."""
    media: bytes = b""
    """`media_bytes` of the page."""

    @property
    def content(self) -> "Content":
        """The last four fields as a plain tuple."""
        return self[2:]


Content = tuple[bytes, bytes, bytes, bytes]
"""`(hash, parent_hash, token_ids, media)` of a page. A plain tuple, because it is faster to make."""


def root_hash(namespace: str, adapter: str) -> bytes:
    """The parent hash of a first page. Different namespaces or adapters never share a hash."""
    names = [name.encode() for name in (namespace, adapter)]
    return hashlib.sha256(b"".join(struct.pack("<q", len(name)) + name for name in names)).digest()


def hash_page(parent_hash: bytes, token_ids: bytes, media: bytes) -> bytes:
    """`sha256(parent_hash ‖ token_ids ‖ media)`: depends on every token up to the page's end, as its keys do.

    The hash is cryptographic for safety: whoever writes prompts could search for collisions of a 64-bit hash.
    It costs about a microsecond a page, once.
    """
    return hashlib.sha256(parent_hash + token_ids + media).digest()


def media_bytes(media: Sequence[Media], start: int, stop: int) -> bytes:
    """The part of a page's hash that describes the media of tokens `start : stop`; empty without media."""
    if not media:
        return b""
    parts = [item for item in media if item.start < stop and item.stop > start]
    return b"".join(
        struct.pack("<qqq", item.start - start, item.stop - start, len(item.digest)) + item.digest for item in parts
    )


class PrefixIndex:
    """Maps contents to pages, for each layer group. Holds no refcounts: `PagePool` knows which pages are free.

    A lookup by hash also compares the tokens, the media and the parent hash. Its caller looks up the earlier pages in
    the same way. So a cache hit does not rest on the hash alone. The exception are tokens that have left a window: the
    caller does not look their pages up.
    """

    def __init__(self, num_groups: int, num_pages: int) -> None:
        self.is_indexed = np.zeros(num_pages, bool)
        """For each page, True if it is in the index."""
        # The content of each page: plain tuples in an array cost the garbage collector nothing, even at 10^6 pages.
        self._contents = np.full(num_pages, None)
        self._groups = np.zeros(num_pages, np.int32)
        self._order = np.zeros(num_pages, np.int64)  # pages are listed in the order in which they were added
        self._num_added = 0
        self._page_of_hash: list[dict[bytes, int]] = [{} for _ in range(num_groups)]
        # By parent hash and first token: the candidates of a partial lookup.
        self._by_start = [PageLists(num_pages) for _ in range(num_groups)]

    def lookup(self, group: int, content: Content) -> int:
        """The page with this hash, if the rest of its content is the same too; else 0."""
        page = self._page_of_hash[group].get(content[0], 0)
        return page if page and self._contents[page] == content else 0

    def contains(self, group: int, content: Content) -> bool:
        """True if a page has this hash; for a partial page, if an indexed page begins with all of its tokens."""
        page_hash, parent_hash, token_ids, _ = content
        if page_hash:
            return page_hash in self._page_of_hash[group]
        _, num_tokens = self.lookup_partial(group, parent_hash, token_ids)
        return 4 * num_tokens == len(token_ids)

    def group_and_hash(self, page: int) -> tuple[int, bytes]:
        """The group and the hash of an indexed page; the hash of a partial page is empty."""
        return int(self._groups[page]), self._contents[page][0]

    def lookup_partial(self, group: int, parent_hash: bytes, token_ids: bytes) -> tuple[int, int]:
        """The page after `parent_hash` that begins with the most of these tokens, and their number; else 0, 0.

        Skips pages with media. Compares only the newest few pages that begin with the same token.
        """
        best = (0, 0)
        for page in self._by_start[group].newest(parent_hash + token_ids[:4], PARTIAL_CANDIDATES):
            _, _, page_tokens, media = self._contents[page]
            best = max(best, (_common_tokens(page_tokens, token_ids), page)) if not media else best
        return best[1], best[0]

    def add(self, group: int, pages: Sequence[int], contents: Sequence[Content]) -> list[int]:
        """Index full pages of a group, skipping content that is already indexed. Returns the pages that were added.

        Also skips the null page, contents without a hash, and pages that are already indexed.
        """
        indexed, stored, by_hash = self.is_indexed.data, self._contents, self._page_of_hash[group]
        added, starts = [], []
        for page, content in zip(pages, contents, strict=True):
            page_hash, parent_hash, token_ids, _ = content
            if page and page_hash and not indexed[page] and by_hash.setdefault(page_hash, page) == page:
                stored[page] = content
                added.append(page)
                starts.append(parent_hash + token_ids[:4])
        self._register(group, added, starts)
        return added

    def add_partial(self, group: int, page: int, content: Content) -> list[int]:
        """Index a partial page, unless it or its tokens are already indexed. Returns the pages that were added."""
        if self.is_indexed[page] or self.contains(group, content):
            return []
        _, parent_hash, token_ids, _ = content
        self._contents[page] = content
        self._register(group, [page], [parent_hash + token_ids[:4]])
        return [page]

    def remove(self, pages: Sequence[int]) -> None:
        """Drop these indexed pages from the index."""
        for page in pages:
            page_hash, parent_hash, token_ids, _ = self._contents[page]
            group = self._groups[page]
            if page_hash:
                del self._page_of_hash[group][page_hash]
            self._by_start[group].remove(parent_hash + token_ids[:4], page)
            self.is_indexed[page], self._contents[page] = False, None

    def indexed_pages(self) -> list[IndexedPage]:
        """All indexed pages, in the order in which they were added."""
        pages = np.flatnonzero(self.is_indexed)
        return [
            IndexedPage(page, int(self._groups[page]), *self._contents[page])
            for page in pages[np.argsort(self._order[pages])].tolist()
        ]

    def _register(self, group: int, pages: list[int], starts: list[bytes]) -> None:
        """Mark pages as indexed, and list them for partial lookups by parent hash and first token (`starts`)."""
        self._by_start[group].add(starts, pages)
        at, self._num_added = self._num_added, self._num_added + len(pages)
        each = np.array(pages, np.intp)
        self.is_indexed[each], self._groups[each], self._order[each] = True, group, np.arange(at, self._num_added)


class PageLists:
    """Named lists of pages, newest first: doubly linked lists in arrays. A page is in at most one list.

    Each call costs O(1) per page.

    >>> lists = PageLists(num_pages=9)
    >>> lists.add([b"a", b"b", b"a", b"a"], [3, 7, 5, 4])
    >>> lists.remove(b"a", 5)
    >>> list(lists.newest(b"a", 9))
    [4, 3]
    """

    def __init__(self, num_pages: int) -> None:
        self._newest: dict[bytes, int] = {}
        self._older = np.zeros(num_pages, np.int32)  # the next page in the list; 0 at the end
        self._newer = np.zeros(num_pages, np.int32)

    def add(self, names: Sequence[bytes], pages: Sequence[int]) -> None:
        """Put each page at the front of the list with its name."""
        newest = self._newest
        for name, page in zip(names, pages, strict=True):
            older = newest.setdefault(name, page)
            if older != page:
                newest[name] = page
                self._older[page], self._newer[older] = older, page

    def remove(self, name: bytes, page: int) -> None:
        """Remove a page from the list with this name."""
        older, newer = int(self._older[page]), int(self._newer[page])
        if older or newer:
            self._older[page] = self._newer[page] = 0
        if older:
            self._newer[older] = newer
        if newer:
            self._older[newer] = older
        elif older:
            self._newest[name] = older
        else:
            del self._newest[name]

    def newest(self, name: bytes, n: int) -> Iterator[int]:
        """Yield the first `n` pages of a list, or all of them if there are fewer."""
        page = self._newest.get(name, 0)
        while page and n:
            yield page
            page, n = int(self._older[page]), n - 1


def _common_tokens(a: bytes, b: bytes) -> int:
    """The number of int32 tokens in the common prefix of `a` and `b`."""
    n = min(len(a), len(b)) // 4
    differ = np.frombuffer(a, np.int32, n) != np.frombuffer(b, np.int32, n)
    return int(differ.argmax()) if differ.any() else n
