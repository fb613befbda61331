"""Which pages each sequence has: the bookkeeping of a paged KV cache, on the host and without jax."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from paged_cache._src.manager.admission import num_cached_pages, num_new_pages, plan_admission
from paged_cache._src.manager.allocator import Allocator, last_pages_first
from paged_cache._src.manager.cache_hit import CacheHit, CacheHitSearch, Pin
from paged_cache._src.manager.events import Subscriber
from paged_cache._src.manager.groups import LayerGroup
from paged_cache._src.manager.moves import PageMoves
from paged_cache._src.manager.pages import Pages
from paged_cache._src.manager.pool import PagePool
from paged_cache._src.manager.prefix import CachedPage
from paged_cache._src.manager.prompt import Prompt
from paged_cache._src.manager.restore import restore
from paged_cache._src.manager.sequences import Sequences, check_integer
from paged_cache._src.manager.stats import PageStats


class PageManager:
    """Gives sequences their pages, lets them share what they have in common, and takes back what nobody needs.

    A step of a serving loop:

        seq = manager.admit(prompt)                       # its prefix may be in pages already
        cache = apply_moves(cache, manager.take_moves())  # what the device must copy first
        ... write keys and values of tokens computed .. length through manager.page_tables(seq), attend, sample ...
        manager.commit(seq, length - computed)            # they are written: others may find them
        manager.extend(seq, 1, [token])                   # a slot for the next token

    Every call does all it was asked or raises (`OutOfPages`, `ValueError`) and changes nothing, and costs O(1) for each
    page that it touches. `seqs` is one id or a list of ids: a decode step of all sequences is one call. Calls that are
    alike give pages that are alike, so many hosts that make the same calls have the same tables. Invariants:

        a page's owners = the table entries that name it, and its pins
        num_free + num_used = num_pages - 1 (the null page is nobody's)
        a slot that a sequence is to write is in a page that it alone owns and that nobody can find

    One manager is for one thread.
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
        """A manager of empty pages.

        Args:
            num_pages: pages of the pool that all groups share, the null page included.
            page_size: tokens a page holds.
            max_seqs: sequences there can be at once.
            max_sequence_length: tokens of the longest sequence.
            groups: layers with a page table each.
            prefix_reuse: whether sequences share pages that hold the same prefix.
            scrub: whether a page is filled with zeros when its content is lost, before anyone else has it.
            num_host_pages: pages of host memory that sequences can be swapped out to.

        Raises:
            ValueError: a size is below its least, or no group grows.
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

    # What there is

    @property
    def num_pages(self) -> int:
        """Pages, the null page included."""
        return self._pages.pool.num_pages

    @property
    def max_seqs(self) -> int:
        """Sequences there can be at once."""
        return self._seqs.max_seqs

    @property
    def max_sequence_length(self) -> int:
        """Tokens of the longest sequence."""
        return self._seqs.max_sequence_length

    @property
    def pages_per_seq(self) -> int:
        """Entries of a page table: pages of the longest sequence."""
        return self._seqs.page_tables.shape[2]

    @property
    def cross_groups(self) -> tuple[int, ...]:
        """Which groups are of cross-attention, by index."""
        return self._allocator.cross_attention

    @property
    def num_free(self) -> int:
        """Pages that sequences can still get: empty ones, and those kept for what they hold."""
        return self._pages.pool.num_free

    @property
    def num_cached(self) -> int:
        """Free pages whose content can be found."""
        return self._pages.pool.num_cached

    @property
    def num_used(self) -> int:
        """Pages with an owner."""
        return self._pages.pool.num_used

    def refcounts(self, pages: ArrayLike) -> np.ndarray:
        """How many owners each page has: table entries that name it, and pins."""
        return self._pages.pool.refcounts(pages)

    def page_tables(self, seqs: ArrayLike, out: np.ndarray | None = None) -> np.ndarray:
        """The page tables int32 `[groups, n, pages_per_seq]` of some sequences, in `out` if that is given.

        Entries without a page are the null page.
        """
        # Rows are known to exist; with the mode "raise" numpy would copy to a buffer first.
        return self._seqs.page_tables.take(self._seqs.indices_on_device(seqs), axis=1, out=out, mode="clip")

    def lengths(self, seqs: ArrayLike) -> np.ndarray:
        """Tokens of each sequence that have a slot, `[n]`."""
        return self._seqs.lengths[self._seqs.indices(seqs)]

    def computed(self, seqs: ArrayLike) -> np.ndarray:
        """Tokens of each sequence whose keys and values are in pages, `[n]`; right after `admit`, those reused."""
        return self._seqs.computed[self._seqs.indices(seqs)]

    def cross_tokens(self, seqs: ArrayLike) -> np.ndarray:
        """Tokens that cross-attention of each sequence sees, `[n]`."""
        return self._seqs.cross_tokens[self._seqs.indices(seqs)]

    def token_ids(self, seq: int) -> np.ndarray:
        """The tokens of a sequence that have a slot; -1 where they are not known."""
        index = self._seqs.index(seq)
        return self._seqs.token_ids[index, : self._seqs.lengths[index]].copy()

    def stats(self) -> PageStats:
        """What was done so far, and how full the pages are; costs O(sequences)."""
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
        """Call `subscriber` with the events of each operation that has any, when it is complete."""
        self._pages.subscribe(subscriber)

    def take_moves(self) -> list[PageMoves]:
        """What the device must do, in order, before it writes anything else; all since the last call."""
        return self._pages.take_moves()

    # The life of a sequence

    def cached_tokens(self, prompt: Prompt | ArrayLike) -> int:
        """How many tokens of this prompt `admit` would find in pages now; takes nothing."""
        prompt = Prompt.of(prompt)
        return self._lookup(prompt, len(prompt) - 1).num_tokens

    def pages_to_admit(self, prompt: Prompt | ArrayLike, *, cross_tokens: int = 0) -> int:
        """How many of the free pages `admit` would take for all of this prompt, found ones that are free included.

        Raises:
            ValueError: `cross_tokens` are not what the groups see.
        """
        prompt = Prompt.of(prompt)
        cross_tokens = self._allocator.check_cross_tokens(cross_tokens)
        hit = self._lookup(prompt, len(prompt) - 1).without_tail(self.page_size)
        return num_new_pages(self._allocator, hit, len(prompt), cross_tokens) + num_cached_pages(self._allocator, hit)

    def admit(
        self, prompt: Prompt | ArrayLike, *, chunk: int | None = None, cross_tokens: int = 0, imported: bool = False
    ) -> int:
        """The id of a new sequence, which no other will ever have.

        It starts with the pages that hold its prefix, `computed(seq)` tokens. That is never all of the prompt: one
        token is left to compute, to have a index to sample from. Full pages are shared; a page that begins with the
        tokens after them is copied. Then come slots for the rest of the prompt.

        Args:
            prompt: its tokens, or these with a namespace and all else that keys and values depend on.
            chunk: slots for so many tokens after the reused ones; `extend` gives the others later. `None`: for all.
            cross_tokens: tokens that groups of cross-attention see. Keys and values of all tokens depend on them, so a
                prompt then finds pages only if its `media` have a digest of them, from token 0 on.
            imported: whether keys and values of all the prompt come from elsewhere, and are committed at once: it keeps
                no page that no query after these tokens sees.

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
            index = self._seqs.indices_on_device(seq)
            self._allocator.release_out_of_window_after(index, self._seqs.lengths[index])
        self._pages.counts.queried_tokens += len(prompt)
        self._pages.counts.cached_tokens += admission.hit.num_tokens
        self._pages.publish()
        return seq

    def extend(self, seqs: ArrayLike, counts: ArrayLike = 1, token_ids: ArrayLike | None = None) -> None:
        """Slots for more tokens of some sequences; of a shared last page the sequence gets a copy of its own first.

        Args:
            seqs: the sequences.
            counts: how many tokens each is to have more.
            token_ids: the tokens, all sequences' one after another; `None` where they are not known before `commit`.

        Raises:
            OutOfPages: not enough pages are free.
            ValueError: an argument is wrong, or a sequence would be longer than `max_sequence_length`.
        """
        indices = self._seqs.indices_on_device(seqs)
        counts = self._seqs.check_counts(counts, len(indices))
        self._allocator.grow(indices, counts, token_ids)
        self._pages.publish()

    def commit(self, seqs: ArrayLike, counts: ArrayLike = 1, token_ids: ArrayLike | None = None) -> None:
        """The next tokens of some sequences are computed: their keys and values are in pages.

        Full pages can be found from now on, and pages that no later query sees are returned. To reject the last tokens
        of a step (speculation), `truncate` them before.

        Args:
            seqs: the sequences.
            counts: how many tokens of each were computed.
            token_ids: these tokens, all sequences' one after another, where `extend` was not told them.

        Raises:
            ValueError: an argument is wrong, or a sequence has not so many tokens left to compute.
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
        """`n` new sequences with all the tokens of this one; pages are shared, and copied on the first write.

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
        """Only the first `num_tokens` tokens of a sequence stay: rejected speculation, or a step back.

        Raises:
            ValueError: there are fewer tokens, or a window has moved on and its pages are gone.
        """
        index = self._seqs.index_on_device(seq)
        num_tokens, length = check_integer("num_tokens", num_tokens, 0), self._seqs.lengths[index]
        if num_tokens > length:
            raise ValueError(f"num_tokens={num_tokens} must lie in 0..{length}, the sequence's tokens")
        self._allocator.check_window(index, num_tokens)
        self._allocator.truncate(index, num_tokens)
        self._pages.publish()

    def release(self, seqs: ArrayLike) -> None:
        """The sequences are no more; what they hold can be found until their pages are needed.

        One that was swapped out gives back its host pages. Preemption by recomputation is this, and `admit` later.

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
        """The sequence's pages go to host pages and are free; until `swap_in` it can only be released.

        Raises:
            OutOfPages: not enough host pages are free.
            ValueError: tokens are left to compute, or it is swapped out already.
        """
        index = self._seqs.index_on_device(seq)
        self._seqs.check_all_computed(index, "swapped out")
        self._allocator.swap_out(index, self._host_pool.allocate(sum(map(len, self._allocator.pages_of(index)))))
        self._pages.publish()

    def swap_in(self, seq: int) -> None:
        """A sequence that was swapped out has pages again, with what they held.

        Raises:
            OutOfPages: not enough pages are free.
            ValueError: it is not swapped out.
        """
        index = self._seqs.index(seq)
        if index not in self._seqs.host_pages:
            raise ValueError(f"sequence {seq} is not swapped out")
        pages = self._pages.allocate(len(self._seqs.host_pages[index]))
        self._host_pool.release(self._allocator.swap_in(index, pages))
        self._allocator.reindex_full_pages(index)
        self._pages.publish()

    # What is kept

    def pin(self, prompt: Prompt | ArrayLike) -> Pin:
        """Keep the full pages that hold the start of this prompt from being evicted, as many as there are."""
        prompt = Prompt.of(prompt)
        hit = self._lookup(prompt, len(prompt)).without_tail(self.page_size)
        pin = Pin(hit.num_tokens, last_pages_first(hit.pages))
        self._pages.share(pin.pages)
        self._pins.add(pin)
        self._pages.publish()
        return pin

    def unpin(self, pin: Pin) -> None:
        """Let the pages of a pin be evicted again.

        Raises:
            ValueError: it is not one of this manager's, or was undone before.
        """
        if pin not in self._pins:
            raise ValueError("pin is not one of this manager's, or was unpinned before")
        self._pins.remove(pin)
        self._pages.release(pin.pages)
        self._pages.publish()

    def reset_prefix_cache(self) -> None:
        """Nothing that is in pages can be found any more, for instance because the model's weights have changed.

        Nor can what the sequences of now have on the host, or compute later: it depends on what they have.
        """
        self._pages.clear_index()
        self._seqs.clear_hashes()
        self._pages.publish()

    def cached_pages(self) -> list[CachedPage]:
        """All pages that can be found, owned or free, in the order in which they came to be found."""
        return self._pages.index.cached_pages()

    def restore(self, kept: Sequence[CachedPage]) -> np.ndarray:
        """Take what another manager's `cached_pages` gave; the page for each, 0 where it is here or there is no room.

        Only empty pages are taken; they are free, and kept. The caller writes their content before the next step, and
        after what `take_moves` says until then.

        Raises:
            ValueError: a page is of another page size or group, or its key is not that of its tokens.
        """
        pages = restore(self._allocator, kept)
        self._pages.publish()
        return pages

    def _lookup(self, prompt: Prompt, limit: int) -> CacheHit:
        if not self._allocator.can_reuse(prompt):
            return CacheHit.none(len(self.groups))
        return CacheHitSearch(self._pages.index, self.groups, self.page_size, prompt).longest(limit)
