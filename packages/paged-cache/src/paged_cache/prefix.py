"""Which pages already hold the start of a sequence."""

import hashlib
from collections.abc import Sequence

import numpy as np

from paged_cache.pool import PagePool


class Prefix:
    """One sequence's full pages under keys that say what they hold: pages to take over, and pages to leave to others.

        key[i] = sha256(key[i - 1] ‖ token ids of page i as int32)        key[-1] = sha256(salt), or zeros without one

    A key stands for every token up to its page's end, as keys and values do: they depend on all tokens before them.
    It has to be a cryptographic hash, because pages are trusted by it alone: when two keys collide, a request reads
    the keys and values of someone else's text, and nothing fails. Collisions of the usual 64-bit hashes can be
    searched for by whoever writes prompts. sha256 costs about a microsecond a page, once.

    Sequences with different salts never share a page, so that no tenant can learn by the clock what others asked.

    Only full pages are kept: a page that is still written has one owner.

    >>> pool, tokens = PagePool(num_pages=9), [3, 1, 4, 1, 5, 9]
    >>> first, pages = Prefix(pool, page_size=2), pool.allocate(3)
    >>> first.find(tokens)
    []
    >>> first.keep(pages, tokens, start=0, end=6)  # after the step that wrote their keys and values
    >>> pool.release(reversed(pages))
    >>> second = Prefix(pool, page_size=2)
    >>> second.find(tokens) == pages[:2]  # one token is left to compute, to have a row to sample from
    True
    """

    def __init__(self, pool: PagePool, page_size: int, salt: str | None = None) -> None:
        """The prefix of a new sequence.

        Args:
            pool: the pages.
            page_size: tokens a page holds, the same for all sequences of a pool.
            salt: only sequences with the same one share pages.

        Raises:
            ValueError: `page_size` is below 1.
        """
        if page_size < 1:
            raise ValueError(f"page_size={page_size} must be at least 1")
        self._pool = pool
        self._page_size = page_size
        self._root = bytes(32) if salt is None else hashlib.sha256(salt.encode()).digest()
        self._keys: list[bytes] = []

    def find(self, token_ids: Sequence[int]) -> list[int]:
        """The pages that hold the most of the sequence's start, but never all of it: one token stays to be computed.

        Nothing is taken: `pool.share` the pages before anything else is allocated, and start at the token after them.

        Args:
            token_ids: all tokens of the sequence; from call to call there may be more, but no other ones.
        """
        pages = []
        for key in self._first_keys((len(token_ids) - 1) // self._page_size, token_ids):
            page = self._pool.find(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def keep(self, page_ids: Sequence[int], token_ids: Sequence[int], *, start: int, end: int) -> None:
        """Let others find the pages that tokens `start : end` have filled; call it once these have been computed.

        Args:
            page_ids: all pages of the sequence.
            token_ids: all tokens of the sequence, at least `end`.
            start: first token that was computed; all before it have been kept.
            end: the token after the last that was computed.

        Raises:
            ValueError: there are not enough pages or tokens, or a page has no owner or is kept under another key.
        """
        first, last = start // self._page_size, end // self._page_size
        if not 0 <= start <= end <= len(token_ids) or last > len(page_ids):
            raise ValueError(
                f"start={start}, end={end} must be in order, with tokens and full pages up to end; there are "
                f"{len(token_ids)} tokens and {len(page_ids)} pages of {self._page_size}"
            )
        if first < last:  # most steps of a decode fill no page
            for page, key in zip(page_ids[first:last], self._first_keys(last, token_ids)[first:], strict=True):
                self._pool.keep(page, key)

    def _first_keys(self, n: int, token_ids: Sequence[int]) -> list[bytes]:
        """Keys of the first `n` pages; each is hashed once in the sequence's life."""
        for page in range(len(self._keys), n):
            tokens = token_ids[page * self._page_size : (page + 1) * self._page_size]
            parent = self._keys[-1] if self._keys else self._root
            self._keys.append(hashlib.sha256(parent + np.asarray(tokens, "<i4").tobytes()).digest())
        return self._keys[:n]
