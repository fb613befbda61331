"""How much of a prompt is in pages already, over all groups of layers."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from paged_cache._src.manager.groups import LayerGroup
from paged_cache._src.manager.prefix import PrefixIndex, media_bytes
from paged_cache._src.manager.prompt import Prompt


@dataclasses.dataclass(frozen=True)
class CacheHit:
    """Pages that hold the start of a prompt.

    tokens  | full pages, shared | the start of a tail page, copied | to be computed |
            0                    num_pages · page_size              num_tokens
    """

    num_pages: int
    """Full pages, the same number in every group; groups that forget hold only those that are still seen."""
    pages: tuple[np.ndarray, ...]
    """For each group the full pages from the first that is needed on; none for cross-attention."""
    num_tokens: int
    """Tokens that need not be computed."""
    tails: np.ndarray
    """For each growing group the page that begins with the tokens after the full pages; empty without any."""

    @classmethod
    def none(cls, num_groups: int) -> "CacheHit":
        """Nothing is in pages."""
        nothing = np.empty(0, np.int32)
        return cls(0, (nothing,) * num_groups, 0, nothing)

    def without_tail(self, page_size: int) -> "CacheHit":
        """The full pages alone."""
        return dataclasses.replace(self, num_tokens=self.num_pages * page_size, tails=self.tails[:0])


@dataclasses.dataclass(frozen=True, eq=False)
class Pin:
    """Pages that are not evicted until `PageManager.unpin` is called with this."""

    num_tokens: int
    """Tokens of the prefix that they hold."""
    pages: np.ndarray
    """Of all groups, those at the prefix's end first."""


@dataclasses.dataclass(frozen=True)
class Admission:
    """A sequence that can be added: there are pages for all of it."""

    prompt: Prompt
    hit: CacheHit
    """Pages that hold its start."""
    length: int
    """Tokens of the prompt that get a slot."""
    cross_tokens: int


class CacheHitSearch:
    """Looks one prompt up in the index; a page that was asked for once is remembered."""

    def __init__(self, index: PrefixIndex, groups: Sequence[LayerGroup], page_size: int, prompt: Prompt) -> None:
        self._index = index
        self._groups = groups
        self._page_size = page_size
        self._prompt = prompt
        self._found: list[dict[int, int]] = [{} for _ in groups]

    def longest(self, limit: int) -> CacheHit:
        """The most of the first `limit` tokens that all groups have what they need of."""
        num_pages = self._num_pages(limit // self._page_size)
        pages = tuple(self._pages(group, num_pages) for group in range(len(self._groups)))
        start = num_pages * self._page_size
        tails, tail_tokens = self._tails(num_pages, min(limit, start + self._page_size))
        return CacheHit(num_pages, pages, start + tail_tokens, tails)

    def _num_pages(self, most: int) -> int:
        """The most full pages after which each group could go on.

        A group that sees everything needs all of them, one that forgets only its last ones, and a shorter start may do
        for one where a longer does not. So each takes away what it must, until none has to.
        """
        for group, each in enumerate(self._groups):
            if each.is_self_attention and not each.is_windowed:
                most = next((page for page in range(most) if not self._find(group, page)), most)
        before = -1
        while most != before:
            before = most
            for group, each in enumerate(self._groups):
                if each.is_windowed:
                    most = self._with_whole_window(group, most)
        return most

    def _with_whole_window(self, group: int, most: int) -> int:
        """The most pages, at most `most`, of which the group has all that a query after them sees."""
        page = most - 1
        while page >= self._first_needed(group, most):
            if not self._find(group, page):
                most = page  # every window that ends after it and is no shorter has it too
            page -= 1
        return most

    def _pages(self, group: int, num_pages: int) -> np.ndarray:
        if not self._groups[group].is_self_attention:
            return np.empty(0, np.int32)
        needed = range(self._first_needed(group, num_pages), num_pages)
        return np.array([self._find(group, page) for page in needed], np.int32)

    def _tails(self, num_pages: int, stop: int) -> tuple[np.ndarray, int]:
        """Pages that begin with the tokens from the full pages' end to `stop`, or with some of them, and how many."""
        start = num_pages * self._page_size
        nothing = np.empty(0, np.int32)
        if stop <= start or media_bytes(self._prompt.media, start, stop):
            return nothing, 0
        parent_hash = self._prompt.prefix_hash(num_pages, self._page_size)
        tokens = self._prompt.token_ids[start:stop].tobytes()
        growing = [group for group, each in enumerate(self._groups) if each.is_self_attention]
        found = [self._index.lookup_partial(group, parent_hash, tokens) for group in growing]
        num_tokens = min(n for _, n in found)
        return (np.array([page for page, _ in found], np.int32), num_tokens) if num_tokens else (nothing, 0)

    def _first_needed(self, group: int, num_pages: int) -> int:
        return self._groups[group].first_needed(num_pages * self._page_size) // self._page_size

    def _find(self, group: int, page: int) -> int:
        found = self._found[group]
        if page not in found:
            found[page] = self._index.lookup(group, self._prompt.full_page(page, self._page_size))
        return found[page]
