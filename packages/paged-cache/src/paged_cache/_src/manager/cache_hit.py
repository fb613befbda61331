"""Looks up the longest prefix of a prompt that all layer groups have in pages."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from paged_cache._src.manager.groups import LayerGroup
from paged_cache._src.manager.prefix import PrefixIndex, media_bytes
from paged_cache._src.manager.prompt import Prompt


@dataclasses.dataclass(frozen=True)
class CacheHit:
    """Pages that hold a prefix of a prompt.

    tokens  | in full pages, shared | in a tail page, copied | to be computed |
            0             num_pages * page_size         num_tokens
    """

    num_pages: int
    """Full pages of the prefix, the same number in every self-attention group."""
    pages: tuple[np.ndarray, ...]
    """For each group its last full pages: all of them, or in a windowed group those that later queries see. Empty for
    cross-attention."""
    num_tokens: int
    """Tokens that need not be computed."""
    tails: np.ndarray
    """For each self-attention group one page that begins with the tokens after the full pages. May be empty."""

    @classmethod
    def none(cls, num_groups: int) -> "CacheHit":
        """A cache miss: no pages and no tokens."""
        nothing = np.empty(0, np.int32)
        return cls(0, (nothing,) * num_groups, 0, nothing)

    def without_tail(self, page_size: int) -> "CacheHit":
        """The hit without its tail pages."""
        return dataclasses.replace(self, num_tokens=self.num_pages * page_size, tails=self.tails[:0])


@dataclasses.dataclass(frozen=True, eq=False)
class Pin:
    """Pages that are not evicted until this is given to `PageManager.unpin`."""

    num_tokens: int
    """Tokens in the pinned pages."""
    pages: np.ndarray
    """Pages of all groups, the end of the prefix first."""


@dataclasses.dataclass(frozen=True)
class Admission:
    """A new sequence for which there are enough pages."""

    prompt: Prompt
    hit: CacheHit
    """Pages that hold its prefix."""
    length: int
    """Tokens of the prompt that get a slot."""
    cross_tokens: int


class CacheHitSearch:
    """Looks up one prompt in the prefix index. Remembers each lookup."""

    def __init__(self, index: PrefixIndex, groups: Sequence[LayerGroup], page_size: int, prompt: Prompt) -> None:
        self._index = index
        self._groups = groups
        self._page_size = page_size
        self._prompt = prompt
        self._lookups: list[dict[int, int]] = [{} for _ in groups]

    def longest(self, limit: int) -> CacheHit:
        """The longest hit within the first `limit` tokens that every group can continue from."""
        num_pages = self._num_pages(limit // self._page_size)
        pages = tuple(self._pages(group, num_pages) for group in range(len(self._groups)))
        start = num_pages * self._page_size
        tails, tail_tokens = self._tails(num_pages, min(limit, start + self._page_size))
        return CacheHit(num_pages, pages, start + tail_tokens, tails)

    def _num_pages(self, most: int) -> int:
        """The largest number of full pages, at most `most`, that every group can continue from.

        Full groups need every page, windowed groups only the last ones; shrink until all agree.
        """
        for group, each in enumerate(self._groups):
            if each.is_self_attention and not each.is_windowed:
                most = next((page for page in range(most) if not self._lookup(group, page)), most)
        before = -1
        while most != before:
            before = most
            for group, each in enumerate(self._groups):
                if each.is_windowed:
                    most = self._with_whole_window(group, most)
        return most

    def _with_whole_window(self, group: int, most: int) -> int:
        """The largest number of pages, at most `most`, after which the group has its whole window in pages."""
        page = most - 1
        while page >= self._first_needed(group, most):
            if not self._lookup(group, page):
                most = page  # every longer prefix, up to the old `most`, needs this page too
            page -= 1
        return most

    def _pages(self, group: int, num_pages: int) -> np.ndarray:
        """The group's pages that queries after `num_pages` pages see."""
        if not self._groups[group].is_self_attention:
            return np.empty(0, np.int32)
        needed = range(self._first_needed(group, num_pages), num_pages)
        return np.array([self._lookup(group, page) for page in needed], np.int32)

    def _tails(self, num_pages: int, stop: int) -> tuple[np.ndarray, int]:
        """One page per self-attention group that begins with the tokens after `num_pages` pages, and how many match.

        Tokens from `stop` on are not compared.
        """
        start = num_pages * self._page_size
        nothing = np.empty(0, np.int32)
        if stop <= start or media_bytes(self._prompt.media, start, stop):
            return nothing, 0
        parent_hash = self._prompt.prefix_hash(num_pages, self._page_size)
        tokens = self._prompt.token_ids[start:stop].tobytes()
        groups = [group for group, each in enumerate(self._groups) if each.is_self_attention]
        found = [self._index.lookup_partial(group, parent_hash, tokens) for group in groups]
        num_tokens = min(n for _, n in found)
        return (np.array([page for page, _ in found], np.int32), num_tokens) if num_tokens else (nothing, 0)

    def _first_needed(self, group: int, num_pages: int) -> int:
        """Number of the first page that queries after `num_pages` pages see."""
        return self._groups[group].first_needed(num_pages * self._page_size) // self._page_size

    def _lookup(self, group: int, page: int) -> int:
        """The page id of the prompt's full page with this number; 0 if it is not indexed."""
        lookups = self._lookups[group]
        if page not in lookups:
            lookups[page] = self._index.lookup(group, self._prompt.full_page(page, self._page_size))
        return lookups[page]
