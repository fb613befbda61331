"""Which page holds which content: keys that name all tokens up to a page's end, and the pages found by them."""

import dataclasses
import hashlib
import struct
from collections.abc import Sequence
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


class KeptPage(NamedTuple):
    """What a page holds, for those who find it: `token_ids`, after all the tokens that `parent` names."""

    page: int
    group: int
    """Index of the group of layers whose keys and values these are."""
    key: bytes
    """The page's own key; empty for a partial page."""
    parent: bytes
    """Key of the page before it, or the root."""
    token_ids: bytes
    """The page's tokens as little-endian int32; fewer than a page of them for a partial page."""
    media: bytes = b""
    """What `media_bytes` said of the page."""


def root_key(namespace: str, adapter: str) -> bytes:
    """The key before the first page: sequences of different namespaces or adapters have no key in common."""
    names = [name.encode() for name in (namespace, adapter)]
    return hashlib.sha256(b"".join(struct.pack("<q", len(name)) + name for name in names)).digest()


def page_key(parent: bytes, token_ids: bytes, media: bytes) -> bytes:
    """`sha256(parent ‖ token_ids ‖ media)`: names every token up to the page's end, for its keys depend on all of them.

    It has to be a cryptographic hash: collisions of the usual 64-bit hashes can be searched for by whoever writes
    prompts. It costs about a microsecond a page, once.
    """
    return hashlib.sha256(parent + token_ids + media).digest()


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
        self.holds = np.zeros(num_pages, bool)
        """For every page whether it can be found; what the pool keeps."""
        self._content: dict[int, KeptPage] = {}
        self._pages: list[dict[bytes, int]] = [{} for _ in range(num_groups)]
        # By the key before them and their first token, in order of age: pages that may continue a prefix.
        self._next: list[dict[tuple[bytes, bytes], dict[int, None]]] = [{} for _ in range(num_groups)]

    def find(self, group: int, key: bytes, *, parent: bytes, token_ids: bytes, media: bytes) -> int:
        """The page of this key, if it holds these tokens and media after `parent`; 0 if there is none."""
        page = self._pages[group].get(key, 0)
        if not page:
            return 0
        content = self._content[page]
        return page if (content.parent, content.token_ids, content.media) == (parent, token_ids, media) else 0

    def has(self, content: KeptPage) -> bool:
        """Whether another page has this key, or begins with the same tokens as this partial page."""
        if content.key:
            return content.key in self._pages[content.group]
        _, alike = self.find_start(content.group, content.parent, content.token_ids)
        return 4 * alike == len(content.token_ids)

    def find_start(self, group: int, parent: bytes, token_ids: bytes) -> tuple[int, int]:
        """A page that comes after `parent` and begins with the most of these tokens, and how many; 0, 0 without one.

        Pages with media are left out, and only the newest few that begin with the same token are compared.
        """
        candidates = self._next[group].get((parent, token_ids[:4]), {})
        best = (0, 0)
        for page, _ in zip(reversed(candidates), range(PARTIAL_CANDIDATES), strict=False):
            content = self._content[page]
            best = max(best, (_common_tokens(content.token_ids, token_ids), page)) if not content.media else best
        return best[1], best[0]

    def keep(self, content: KeptPage) -> bool:
        """Let a page be found; `False`, and nothing changes, if it is kept already or another is found by the same."""
        if content.page in self._content or self.has(content):
            return False
        self.holds[content.page] = True
        self._content[content.page] = content
        if content.key:
            self._pages[content.group][content.key] = content.page
        siblings = self._next[content.group].setdefault((content.parent, content.token_ids[:4]), {})
        siblings[content.page] = None
        return True

    def forget(self, pages: Sequence[int]) -> list[KeptPage]:
        """What these pages hold cannot be found any more; returns it. Pages that were not kept are passed over."""
        forgotten = [self._content.pop(page) for page in pages if page in self._content]
        for content in forgotten:
            self.holds[content.page] = False
            if content.key:
                del self._pages[content.group][content.key]
            place = (content.parent, content.token_ids[:4])
            siblings = self._next[content.group][place]
            del siblings[content.page]
            if not siblings:
                del self._next[content.group][place]
        return forgotten

    def kept_pages(self) -> list[KeptPage]:
        """All that can be found, the oldest first."""
        return list(self._content.values())


def _common_tokens(a: bytes, b: bytes) -> int:
    """How many int32 tokens two strings of them begin with alike."""
    n = min(len(a), len(b)) // 4
    differ = np.frombuffer(a, np.int32, n) != np.frombuffer(b, np.int32, n)
    return int(differ.argmax()) if differ.any() else n
