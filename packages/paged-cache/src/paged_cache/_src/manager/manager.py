"""The page manager: decides on the host, without jax, which pages each sequence has."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from paged_cache._src.manager.admission import pages_to_admit, plan_admission
from paged_cache._src.manager.allocator import Allocator, last_pages_first
from paged_cache._src.manager.cache_hit import CacheHit, CacheHitSearch, Pin
from paged_cache._src.manager.events import Subscriber
from paged_cache._src.manager.groups import LayerGroup
from paged_cache._src.manager.moves import PageMoves
from paged_cache._src.manager.pages import Pages
from paged_cache._src.manager.pool import PagePool
from paged_cache._src.manager.prefix import IndexedPage
from paged_cache._src.manager.prompt import Prompt
from paged_cache._src.manager.restore import restore
from paged_cache._src.manager.sequences import Sequences, check_integer
from paged_cache._src.manager.stats import PageStats


class PageManager:
    """Allocates pages to sequences, shares pages of equal prefixes, and frees pages.

    A step of a serving loop:

        seq = manager.admit(prompt)                       # shares pages that hold its prefix
        cache = apply_moves(cache, manager.take_moves())  # copies pages on the device
        ... write keys and values of tokens computed .. length through manager.page_tables(seq), attend, sample ...
        manager.commit(seq, length - computed)            # full pages are indexed: later prompts can hit them
        manager.extend(seq, 1, [token])                   # a slot for the next token

    A page is empty, in use, or cached: free, but indexed by its content, so that a prompt can still hit it. If no page
    is empty, cached pages are evicted, the least recently released first. Always:

        refcount of a page = the number of page tables and pins that name it
        num_free + num_used = num_pages - 1 (page 0 is the null page)
        tokens are written only to private pages: refcount 1, not indexed

    `seqs` is one id or a list of ids: a decode step of all sequences is one call. A call either does everything or
    raises (`OutOfPages`, `ValueError`) and changes nothing. It costs O(1) per page that it touches. The manager is
    deterministic: hosts that make the same calls have the same page tables. It is not thread-safe.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        *,
        max_seqs: int,
        max_sequence_length: int,
        groups: Sequence[LayerGroup] = (LayerGroup.full(),),
        prefix_reuse: bool = True,
        scrub: bool = False,
        num_host_pages: int = 0,
    ) -> None:
        """Create a manager of empty pages.

        Args:
            num_pages: pages of the pool that all groups share, including the null page.
            page_size: tokens per page.
            max_seqs: the most sequences at once.
            max_sequence_length: the most tokens of a sequence.
            groups: the layer groups; each has a page table per sequence.
            prefix_reuse: True to share pages between sequences with the same prefix.
            scrub: True to fill a page with zeros before another sequence gets it.
            num_host_pages: pages of host memory for swapping.

        Raises:
            ValueError: a size is too small, or no group is of self-attention.
        """
        self.groups = tuple(groups)
        self.num_host_pages = check_integer("num_host_pages", num_host_pages, 0)
        self.prefix_reuse = prefix_reuse
        self._seqs = Sequences(max_seqs, max_sequence_length, page_size, len(self.groups))
        self.page_size = self._seqs.page_size
        self._pages = Pages(num_pages, len(self.groups), scrub=scrub)
        self._allocator = Allocator(self._seqs, self._pages, self.groups, prefix_reuse=prefix_reuse)
        self._host_pool = PagePool(self.num_host_pages + 1, "host ")
        self._pins: set[Pin] = set()

    # State

    @property
    def num_pages(self) -> int:
        """Number of pages, including the null page."""
        return self._pages.pool.num_pages

    @property
    def max_seqs(self) -> int:
        """The most sequences at once."""
        return self._seqs.max_seqs

    @property
    def max_sequence_length(self) -> int:
        """The most tokens of a sequence."""
        return self._seqs.max_sequence_length

    @property
    def pages_per_seq(self) -> int:
        """Length of a page table: pages of the longest sequence."""
        return self._seqs.page_tables.shape[2]

    @property
    def cross_groups(self) -> tuple[int, ...]:
        """The indices of the cross-attention groups."""
        return self._allocator.cross_attention

    @property
    def num_free(self) -> int:
        """Number of free pages: empty and cached pages."""
        return self._pages.pool.num_free

    @property
    def num_cached(self) -> int:
        """Number of cached pages: free, with content that is in the prefix index."""
        return self._pages.pool.num_cached

    @property
    def num_used(self) -> int:
        """Number of pages in use."""
        return self._pages.pool.num_used

    def refcounts(self, pages: ArrayLike) -> np.ndarray:
        """The refcount of each page: the number of page tables and pins that name it."""
        return self._pages.pool.refcounts(pages)

    def page_tables(self, seqs: ArrayLike, out: np.ndarray | None = None) -> np.ndarray:
        """The page tables of these sequences, int32 `[groups, n, pages_per_seq]`, written to `out` if it is given.

        Entries without a page are 0, the null page.
        """
        # The indices are valid. With mode="raise", numpy would copy to a buffer first.
        return self._seqs.page_tables.take(self._seqs.indices_on_device(seqs), axis=1, out=out, mode="clip")

    def lengths(self, seqs: ArrayLike) -> np.ndarray:
        """The number of tokens of each sequence that have a slot, `[n]`."""
        return self._seqs.lengths[self._seqs.indices(seqs)]

    def computed(self, seqs: ArrayLike) -> np.ndarray:
        """The number of tokens of each sequence whose keys and values are in pages, `[n]`.

        Right after `admit`, these are the cache hits.
        """
        return self._seqs.computed[self._seqs.indices(seqs)]

    def cross_tokens(self, seqs: ArrayLike) -> np.ndarray:
        """The number of tokens that cross-attention of each sequence sees, `[n]`."""
        return self._seqs.cross_tokens[self._seqs.indices(seqs)]

    def token_ids(self, seq: int) -> np.ndarray:
        """The ids of a sequence's tokens that have a slot; -1 where an id is not known."""
        index = self._seqs.index(seq)
        return self._seqs.token_ids[index, : self._seqs.lengths[index]].copy()

    def stats(self) -> PageStats:
        """The state of the pages and the totals so far; costs O(sequences)."""
        pool = self._pages.pool
        return PageStats(
            num_used=pool.num_used,
            num_cached=pool.num_cached,
            num_empty=pool.num_empty,
            num_seqs=self._seqs.num_seqs,
            unused_slots=self._allocator.unused_slots(),
            page_size=self.page_size,
            **dataclasses.asdict(self._pages.counts),
        )

    def subscribe(self, subscriber: Subscriber) -> None:
        """Call `subscriber` with the events of each operation, after the operation, if it has events."""
        self._pages.subscribe(subscriber)

    def take_moves(self) -> list[PageMoves]:
        """The moves since the last call. The device must make them, in order, before it writes anything else."""
        return self._pages.take_moves()

    # The life of a sequence

    def cached_tokens(self, prompt: Prompt | ArrayLike) -> int:
        """The number of this prompt's tokens that would be cache hits in `admit` now. Changes nothing."""
        prompt = Prompt.of(prompt)
        return self._lookup(prompt, len(prompt) - 1).num_tokens

    def pages_for(self, num_tokens: int, *, chunk: int, cross_tokens: int = 0) -> int:
        """The most pages that one sequence holds at once while it grows to `num_tokens`, at most `chunk` tokens a step.

        If this is at most `num_pages - 1`, the sequence can be finished, by preempting all others if need be.

        Args:
            num_tokens: the sequence's tokens at its end.
            chunk: the most tokens that one call of `admit` or `extend` adds.
            cross_tokens: tokens that cross-attention groups see.

        Raises:
            ValueError: a number is below its minimum, or `cross_tokens` does not fit the groups.
        """
        num_tokens, chunk = check_integer("num_tokens", num_tokens, 0), check_integer("chunk", chunk, 1)
        cross_tokens = self._allocator.check_cross_tokens(cross_tokens)
        lengths = [num_tokens if group.is_self_attention else cross_tokens for group in self.groups]
        each = zip(self.groups, lengths, strict=True)
        return sum(group.most_pages(length, chunk, self.page_size) for group, length in each)

    def pages_to_admit(self, prompt: Prompt | ArrayLike, *, chunk: int | None = None, cross_tokens: int = 0) -> int:
        """The most free pages that this prompt takes until all of it is computed, including its cached pages.

        Args:
            prompt: as for `admit`.
            chunk: the most tokens that one step computes of it. A windowed group then counts only the pages that it
                holds at once. `None`: `admit` adds slots for the whole prompt.
            cross_tokens: as for `admit`.

        Raises:
            ValueError: `chunk` is below 1, or `cross_tokens` does not fit the groups.
        """
        prompt = Prompt.of(prompt)
        cross_tokens = self._allocator.check_cross_tokens(cross_tokens)
        chunk = None if chunk is None else check_integer("chunk", chunk, 1)
        hit = self._lookup(prompt, len(prompt) - 1).without_tail(self.page_size)
        return pages_to_admit(self._allocator, prompt, hit, chunk=chunk, cross_tokens=cross_tokens)

    def pages_to_extend(self, seqs: ArrayLike, lengths: ArrayLike, *, chunk: int) -> int:
        """The most pages that these sequences may still take until each has `lengths` tokens.

        Does not count the copies of last pages that forked sequences share.

        Args:
            seqs: the sequences.
            lengths: tokens that each sequence is to have.
            chunk: the most tokens that one step adds to a sequence.

        Raises:
            ValueError: an argument is wrong, or a sequence is swapped out.
        """
        indices = self._seqs.indices_on_device(seqs)
        chunk = check_integer("chunk", chunk, 1)
        lengths = self._seqs.check_counts(lengths, len(indices), "lengths")
        return self._allocator.pages_to_grow(indices, lengths, chunk)

    def admit(
        self, prompt: Prompt | ArrayLike, *, chunk: int | None = None, cross_tokens: int = 0, imported: bool = False
    ) -> int:
        """Add a sequence with slots for its prompt, and return its id. No id is used twice.

        The prompt's prefix may be a cache hit, `computed(seq)` tokens long. Full pages of the hit are shared. If a page
        begins with the next tokens, it is copied. At least one token is left to compute, because the step needs a row
        to sample from.

        Args:
            prompt: token ids, or a `Prompt` with a namespace, an adapter or media.
            chunk: slots for this many tokens after the cache hit; `extend` adds the others later. `None`: for all.
            cross_tokens: tokens that cross-attention groups see. The keys and values of all tokens depend on them, so
                a prompt then hits the cache only if its `media` cover token 0 with a digest of them.
            imported: True if all keys and values of the prompt come from elsewhere, and are committed at once. Pages
                that no query after the prompt sees are then released right away.

        Raises:
            OutOfPages: not enough pages are free.
            ValueError: the prompt is empty or too long, there are `max_seqs` sequences, or another argument is wrong.
        """
        prompt = Prompt.of(prompt)
        self._seqs.check_lengths(len(prompt))
        self._seqs.check_room(1)
        cross_tokens = self._allocator.check_cross_tokens(cross_tokens)
        chunk = len(prompt) if chunk is None else check_integer("chunk", chunk, 1)
        hit = self._lookup(prompt, len(prompt) - 1)
        admission = plan_admission(self._allocator, prompt, hit, chunk=chunk, cross_tokens=cross_tokens)
        seq = self._allocator.add(admission)
        if imported:
            indices = self._seqs.indices_on_device(seq)
            self._allocator.release_out_of_window_after(indices, self._seqs.lengths[indices])
        self._pages.counts.queried_tokens += len(prompt)
        self._pages.counts.cached_tokens += admission.hit.num_tokens
        self._pages.publish()
        return seq

    def extend(self, seqs: ArrayLike, counts: ArrayLike = 1, token_ids: ArrayLike | None = None) -> None:
        """Add slots for more tokens. A shared tail page is copied before its first write (copy on write).

        Args:
            seqs: the sequences.
            counts: how many tokens to add to each.
            token_ids: the new tokens, one sequence after another; `None` if they are not known before `commit`.

        Raises:
            OutOfPages: not enough pages are free.
            ValueError: an argument is wrong, or a sequence would be longer than `max_sequence_length`.
        """
        indices = self._seqs.indices_on_device(seqs)
        counts = self._seqs.check_counts(counts, len(indices))
        self._allocator.grow(indices, counts, token_ids)
        self._pages.publish()

    def commit(self, seqs: ArrayLike, counts: ArrayLike = 1, token_ids: ArrayLike | None = None) -> None:
        """Record that the keys and values of the next tokens are in pages.

        Indexes full pages, and releases pages that no later query sees. To reject the last tokens of a step
        (speculative decoding), call `truncate` before `commit`.

        Args:
            seqs: the sequences.
            counts: how many tokens of each were computed.
            token_ids: these tokens, one sequence after another, if `extend` was called without them.

        Raises:
            ValueError: an argument is wrong, or a sequence has fewer tokens left to compute.
        """
        indices = self._seqs.indices_on_device(seqs)
        counts = self._seqs.check_counts(counts, len(indices))
        computed = self._seqs.computed_after(indices, counts)
        full = self._allocator.next_full_pages(indices, computed, token_ids)
        self._seqs.computed[indices] = computed
        if full is not None:
            self._allocator.index_full_pages(full)
        self._allocator.release_out_of_window(indices)
        self._pages.publish()

    def fork(self, seq: int, n: int = 1) -> list[int]:
        """Add `n` copies of a sequence, and return their ids. Pages are shared, and copied on the first write.

        Raises:
            ValueError: tokens are left to compute, or there would be more than `max_seqs` sequences.
        """
        index = self._seqs.index_on_device(seq)
        n = check_integer("n", n, 1)
        self._seqs.check_room(n)
        self._seqs.check_all_computed(index, "forked")
        self._pages.share(np.concatenate(self._allocator.pages_of(index)), n)
        return [self._seqs.add_fork(index) for _ in range(n)]

    def truncate(self, seq: int, num_tokens: int) -> None:
        """Shorten a sequence to its first `num_tokens` tokens, for instance after rejected speculation.

        Raises:
            ValueError: the sequence has fewer tokens, or a window would need pages that were released.
        """
        index = self._seqs.index_on_device(seq)
        num_tokens, length = check_integer("num_tokens", num_tokens, 0), self._seqs.lengths[index]
        if num_tokens > length:
            raise ValueError(f"num_tokens={num_tokens} must lie in 0..{length}, the sequence's tokens")
        self._allocator.check_window(index, num_tokens)
        self._allocator.truncate(index, num_tokens)
        self._pages.publish()

    def release(self, seqs: ArrayLike) -> None:
        """Remove sequences and release their pages. Indexed pages become cached: later prompts can hit them.

        Also releases the host pages of a swapped-out sequence. To preempt a sequence by recomputation, release it and
        admit it again later.

        Raises:
            ValueError: a sequence does not exist, or is named twice.
        """
        for index in self._seqs.indices(seqs).tolist():
            if index in self._seqs.host_pages:
                self._host_pool.release(self._seqs.host_pages[index])
            else:
                self._allocator.reindex_full_pages(index)
                self._allocator.index_partial_page(index)
                self._allocator.release_all(index)
            self._seqs.remove(index)
        self._pages.publish()

    # Swap

    def swap_out(self, seq: int) -> None:
        """Move a sequence to host pages, and release its pages. Until `swap_in` it can only be released.

        Raises:
            OutOfPages: not enough host pages are free.
            ValueError: tokens are left to compute, or the sequence is already swapped out.
        """
        index = self._seqs.index_on_device(seq)
        self._seqs.check_all_computed(index, "swapped out")
        self._allocator.swap_out(index, self._host_pool.allocate(sum(map(len, self._allocator.pages_of(index)))))
        self._pages.publish()

    def swap_in(self, seq: int) -> None:
        """Move a swapped-out sequence back to new pages.

        Raises:
            OutOfPages: not enough pages are free.
            ValueError: the sequence is not swapped out.
        """
        index = self._seqs.index(seq)
        if index not in self._seqs.host_pages:
            raise ValueError(f"sequence {seq} is not swapped out")
        pages = self._pages.allocate(len(self._seqs.host_pages[index]))
        self._host_pool.release(self._allocator.swap_in(index, pages))
        self._allocator.reindex_full_pages(index)
        self._pages.publish()

    # The prefix cache

    def pin(self, prompt: Prompt | ArrayLike) -> Pin:
        """Protect the full pages that hold this prompt's prefix from eviction, as far as they are indexed now."""
        prompt = Prompt.of(prompt)
        hit = self._lookup(prompt, len(prompt)).without_tail(self.page_size)
        pin = Pin(hit.num_tokens, last_pages_first(hit.pages))
        self._pages.share(pin.pages)
        self._pins.add(pin)
        self._pages.publish()
        return pin

    def unpin(self, pin: Pin) -> None:
        """End the protection of a pin.

        Raises:
            ValueError: the pin is not one of this manager's, or was unpinned before.
        """
        if pin not in self._pins:
            raise ValueError("pin is not one of this manager's, or was unpinned before")
        self._pins.remove(pin)
        self._pages.release(pin.pages)
        self._pages.publish()

    def reset_prefix_cache(self) -> None:
        """Drop all pages from the prefix index, for instance because the model's weights have changed.

        Current sequences also stop contributing to the prefix index.
        """
        self._pages.clear_index()
        self._seqs.clear_hashes()
        self._pages.publish()

    def indexed_pages(self) -> list[IndexedPage]:
        """All indexed pages, in use or free, in the order in which they were indexed."""
        return self._pages.index.indexed_pages()

    def restore(self, cached: Sequence[IndexedPage]) -> np.ndarray:
        """Index what another manager's `indexed_pages` returned, in empty pages, which become cached.

        Returns one page id per entry; 0 if already cached or if no empty page is left. The caller writes the content
        to these pages before the next step, after the moves of `take_moves`.

        Raises:
            ValueError: an entry has another page size or group, or its hash is not that of its tokens.
        """
        pages = restore(self._allocator, cached)
        self._pages.publish()
        return pages

    def _lookup(self, prompt: Prompt, limit: int) -> CacheHit:
        """The longest cache hit within the first `limit` tokens."""
        if not self._allocator.can_reuse(prompt):
            return CacheHit.none(len(self.groups))
        return CacheHitSearch(self._pages.index, self.groups, self.page_size, prompt).longest(limit)
