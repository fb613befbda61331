"""Which page holds which content: keys that name all tokens up to a page's end, and the pages found by them."""

import dataclasses
import hashlib
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

PARTIAL_CANDIDATES = 8
"""Pages that are compared, the newest first, for one whose start continues a prefix: an operation stays O(pages)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Media:
    """What the tokens `start : stop` stand for where ids alone do not say it: a picture or a sound of this digest.

    Raises:
        ValueError: it has no tokens, or no digest.
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


class CachedPage(NamedTuple):
    """What a page holds, for those who find it: `token_ids`, after all the tokens that `parent` names."""

    page: int
    group: int
    """Index of the group of layers whose keys and values these are."""
    hash: bytes
    """The page's own key; empty for a partial page."""
    parent_hash: bytes
    """Key of the page before it, or the root."""
    token_ids: bytes
    """The page's tokens as little-endian int32; fewer than a page of them for a partial page."""
    media: bytes = b""
    """What `media_bytes` said of the page."""

    @property
    def content(self) -> "Content":
        """What it holds, and what that is found by."""
        return self[2:]


Content = tuple[bytes, bytes, bytes, bytes]
"""The last four fields of a `CachedPage` as a plain tuple, of which many are made in little time."""


def root_hash(namespace: str, adapter: str) -> bytes:
    """The key before the first page: sequences of different namespaces or adapters have no key in common."""
    names = [name.encode() for name in (namespace, adapter)]
    return hashlib.sha256(b"".join(struct.pack("<q", len(name)) + name for name in names)).digest()


def hash_page(parent_hash: bytes, token_ids: bytes, media: bytes) -> bytes:
    """`sha256(parent_hash ‖ token_ids ‖ media)`: a hash of every token up to the page's end.

    It has to be a cryptographic hash: collisions of the usual 64-bit hashes can be searched for by whoever writes
    prompts. It costs about a microsecond a page, once.
    """
    return hashlib.sha256(parent_hash + token_ids + media).digest()


def media_bytes(media: Sequence[Media], start: int, stop: int) -> bytes:
    """What the media that tokens `start : stop` stand for add to their page's key; nothing without any."""
    if not media:
        return b""
    parts = [item for item in media if item.start < stop and item.stop > start]
    return b"".join(
        struct.pack("<qqq", item.start - start, item.stop - start, len(item.digest)) + item.digest for item in parts
    )


class PrefixIndex:
    """Finds pages by what they hold. It names pages and owns none: the pool says which are free.

    A page found by its key is believed only if it holds the tokens and media looked for, after the same key. The pages
    before it were compared in the same way, so a hit does not rest on the hash alone; it does for tokens that a window
    has left behind, whose pages nobody looks for.
    """

    def __init__(self, num_groups: int, num_pages: int) -> None:
        self.is_indexed = np.zeros(num_pages, bool)
        """For every page whether it can be found; what the pool keeps."""
        # What each page holds: plain tuples in an array, which cost the garbage collector nothing at a million pages.
        self._contents = np.full(num_pages, None)
        self._groups = np.zeros(num_pages, np.int32)
        self._order = np.zeros(num_pages, np.int64)
        self._num_added = 0  # so far
        self._page_of_hash: list[dict[bytes, int]] = [{} for _ in range(num_groups)]
        # By the key before them and their first token: pages that may continue a prefix.
        self._by_start = [PageLists(num_pages) for _ in range(num_groups)]

    def lookup(self, group: int, content: Content) -> int:
        """The page of this key, if it holds these tokens and media after the same; 0 if there is none."""
        page = self._page_of_hash[group].get(content[0], 0)
        return page if page and self._contents[page] == content else 0

    def contains(self, group: int, content: Content) -> bool:
        """Whether a page has this key, or begins with the same tokens as this partial page."""
        page_hash, parent_hash, token_ids, _ = content
        if page_hash:
            return page_hash in self._page_of_hash[group]
        _, alike = self.lookup_partial(group, parent_hash, token_ids)
        return 4 * alike == len(token_ids)

    def group_and_hash(self, page: int) -> tuple[int, bytes]:
        """The group and the key of a page that can be found; a partial page's key is empty."""
        return int(self._groups[page]), self._contents[page][0]

    def lookup_partial(self, group: int, parent_hash: bytes, token_ids: bytes) -> tuple[int, int]:
        """A page that comes after `parent` and begins with the most of these tokens, and how many; 0, 0 without one.

        Pages with media are left out, and only the newest few that begin with the same token are compared.
        """
        best = (0, 0)
        for page in self._by_start[group].newest(parent_hash + token_ids[:4], PARTIAL_CANDIDATES):
            _, _, held, media = self._contents[page]
            best = max(best, (_common_tokens(held, token_ids), page)) if not media else best
        return best[1], best[0]

    def add(self, group: int, pages: Sequence[int], contents: Sequence[Content]) -> list[int]:
        """Let pages of a group be found by what they hold, but for those that are kept, or for which another is found.

        The null page, and full pages without a key, come with a group's others and are passed over. Returns the pages
        that can be found now and could not before.
        """
        indexed, stored, by_hash, kept, starts = self.is_indexed.data, self._contents, self._page_of_hash[group], [], []
        for page, content in zip(pages, contents, strict=True):
            page_hash, parent_hash, token_ids, _ = content
            if page and page_hash and not indexed[page] and by_hash.setdefault(page_hash, page) == page:
                stored[page] = content
                kept.append(page)
                starts.append(parent_hash + token_ids[:4])
        self._register(group, kept, starts)
        return kept

    def add_partial(self, group: int, page: int, content: Content) -> list[int]:
        """Let a page be found by what it begins with, unless it is kept, or another begins alike; as `keep`."""
        if self.is_indexed[page] or self.contains(group, content):
            return []
        _, parent_hash, token_ids, _ = content
        self._contents[page] = content
        self._register(group, [page], [parent_hash + token_ids[:4]])
        return [page]

    def remove(self, pages: Sequence[int]) -> None:
        """What these pages hold, which can be found, can be found no more."""
        for page in pages:
            page_hash, parent_hash, token_ids, _ = self._contents[page]
            group = self._groups[page]
            if page_hash:
                del self._page_of_hash[group][page_hash]
            self._by_start[group].remove(parent_hash + token_ids[:4], page)
            self.is_indexed[page], self._contents[page] = False, None

    def cached_pages(self) -> list[CachedPage]:
        """All that can be found, the oldest first."""
        pages = np.flatnonzero(self.is_indexed)
        return [
            CachedPage(page, int(self._groups[page]), *self._contents[page])
            for page in pages[np.argsort(self._order[pages])].tolist()
        ]

    def _register(self, group: int, pages: list[int], starts: list[bytes]) -> None:
        """These pages can be found from now on, and by these starts."""
        self._by_start[group].add(starts, pages)
        at, self._num_added = self._num_added, self._num_added + len(pages)
        each = np.array(pages, np.intp)
        self.is_indexed[each], self._groups[each], self._order[each] = True, group, np.arange(at, self._num_added)


class PageLists:
    """Lists of pages by name, the newest first. A page is in one of them at most; each call costs O(1) a page.

    >>> lists = PageLists(num_pages=9)
    >>> lists.add([b"a", b"b", b"a", b"a"], [3, 7, 5, 4])
    >>> lists.remove(b"a", 5)
    >>> list(lists.newest(b"a", 9))
    [4, 3]
    """

    def __init__(self, num_pages: int) -> None:
        self._newest: dict[bytes, int] = {}
        self._older = np.zeros(num_pages, np.int32)  # next in the list; 0 at its end
        self._newer = np.zeros(num_pages, np.int32)

    def add(self, names: Sequence[bytes], pages: Sequence[int]) -> None:
        """Put each page in front of a list."""
        newest = self._newest
        for name, page in zip(names, pages, strict=True):
            older = newest.setdefault(name, page)
            if older != page:
                newest[name] = page
                self._older[page], self._newer[older] = older, page

    def remove(self, name: bytes, page: int) -> None:
        """Take a page out of the list that it is in."""
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
        """The first `n` pages of a list, or all if there are fewer."""
        page = self._newest.get(name, 0)
        while page and n:
            yield page
            page, n = int(self._older[page]), n - 1


def _common_tokens(a: bytes, b: bytes) -> int:
    """How many int32 tokens two strings of them begin with alike."""
    n = min(len(a), len(b)) // 4
    differ = np.frombuffer(a, np.int32, n) != np.frombuffer(b, np.int32, n)
    return int(differ.argmax()) if differ.any() else n
