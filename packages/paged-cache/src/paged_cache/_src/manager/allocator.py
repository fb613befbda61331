"""Gives sequences their pages in every layer group. The page manager's operations consist of these steps."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from paged_cache._src.manager.arrays import ragged
from paged_cache._src.manager.cache_hit import Admission
from paged_cache._src.manager.groups import Count, LayerGroup
from paged_cache._src.manager.pages import Pages
from paged_cache._src.manager.prefix import Content, media_bytes
from paged_cache._src.manager.prompt import Prompt, check_tokens
from paged_cache._src.manager.sequences import UNKNOWN, Sequences, check_integer


class FullPages(NamedTuple):
    """Pages that have become full, in order."""

    places: tuple[np.ndarray, np.ndarray]
    """Their `(indices, page numbers)`: a numpy index of a group's page tables."""
    contents: list[Content]


class Allocator:
    """Keeps sequences and pages consistent: page tables, refcounts and the prefix index.

    `index` and `indices` are indices of sequences in `seqs`. A page's number is its position in the page table. The
    caller has checked all arguments, except where a method lists errors.

    Tail page: the last page of a sequence, if it is not full. It takes the next token.
    """

    def __init__(self, seqs: Sequences, pages: Pages, groups: Sequence[LayerGroup], *, prefix_reuse: bool) -> None:
        """Create an allocator without sequences. With `prefix_reuse=False`, no page is ever indexed.

        Raises:
            ValueError: no group is of self-attention.
        """
        if not any(group.is_self_attention for group in groups):
            raise ValueError(f"groups={groups} must have a self-attention group: full, window or chunked")
        self.seqs = seqs
        self.pages = pages
        self.groups = tuple(groups)
        self.page_size = seqs.page_size
        self.prefix_reuse = prefix_reuse
        self.self_attention = [index for index, group in enumerate(groups) if group.is_self_attention]
        self.cross_attention = tuple(index for index, group in enumerate(groups) if not group.is_self_attention)
        self.windowed = [index for index, group in enumerate(groups) if group.is_windowed]

    def num_pages(self, tokens: Count) -> Count:
        """The number of pages that hold this many tokens."""
        return -(-tokens // self.page_size)

    def pages_of(self, index: int) -> list[np.ndarray]:
        """The page ids of a sequence, one array per group."""
        return [self.seqs.page_tables[group, index, start:stop] for group, start, stop in self._spans(index)]

    def can_reuse(self, prompt: Prompt) -> bool:
        """True if pages of this prompt may be shared.

        With cross-attention, keys and values also depend on what it sees: then the media must cover token 0.
        """
        return self.prefix_reuse and (not self.cross_attention or bool(media_bytes(prompt.media, 0, 1)))

    def add(self, new: Admission) -> int:
        """Add a sequence that starts with a cache hit, and return its id. `plan_admission` found enough pages."""
        hit = new.hit
        self.pages.share(np.concatenate([*hit.pages, hit.tails]))  # before `allocate` can evict them
        num_new = self.num_pages(new.length) - hit.num_pages
        num_cross = self.num_pages(new.cross_tokens)
        pages = self.pages.allocate(num_new * len(self.self_attention) + num_cross * len(self.cross_attention))
        own, cross = np.split(pages, [num_new * len(self.self_attention)])
        index, seq = self.seqs.add(new)
        if not self.can_reuse(new.prompt):
            self.seqs.hashes[index].clear()
        for group in self.self_attention:
            first = hit.num_pages - len(hit.pages[group])
            self.seqs.first_page[group, index] = first
            self.seqs.page_tables[group, index, first : hit.num_pages] = hit.pages[group]
        self.fill_page_tables(ragged(np.array([index]), np.array([hit.num_pages]), np.array([num_new])), own)
        for at, group in enumerate(self.cross_attention):
            self.seqs.page_tables[group, index, :num_cross] = cross[at * num_cross : (at + 1) * num_cross]
        if len(hit.tails):
            self.pages.copy(hit.tails, own.reshape(len(self.self_attention), -1)[:, 0])
            self.pages.release(hit.tails)
        return seq

    def grow(self, indices: np.ndarray, counts: np.ndarray, token_ids: ArrayLike | None) -> None:
        """Add slots for `counts` more tokens of each sequence, in private pages that are not indexed.

        Raises:
            OutOfPages: not enough pages are free; nothing changes.
            ValueError: a sequence would be too long, or `token_ids` do not fit `counts`; nothing changes.
        """
        lengths = self.seqs.lengths[indices]
        ends = lengths + counts
        self.seqs.check_lengths(ends)
        places = ragged(indices, lengths, counts)
        tokens = UNKNOWN if token_ids is None else check_tokens(token_ids, len(places[0]))
        maybe_shared = indices[~self.seqs.has_private_tail[indices]]
        shared = self._shared_tails(maybe_shared)
        new_pages = self._new_page_numbers(indices, lengths, ends)
        pages = self.pages.allocate(len(shared) + len(new_pages[0]) * len(self.self_attention))
        self._make_tails_private(maybe_shared, shared, pages[: len(shared)])
        self.fill_page_tables(new_pages, pages[len(shared) :])
        self.seqs.token_ids[places] = tokens
        self.seqs.lengths[indices] = ends

    def pages_to_grow(self, indices: np.ndarray, lengths: np.ndarray, chunk: int) -> int:
        """The most pages that sequences may still take to have `lengths` tokens, with at most `chunk` more a step."""
        ends, total = self.num_pages(self.seqs.lengths[indices]), 0
        for group in self.self_attention:
            held = ends - self.seqs.first_page[group, indices]
            most = self.groups[group].most_pages(lengths, chunk, self.page_size)
            total += int(np.maximum(most - held, 0).sum())
        return total

    def fill_page_tables(self, places: tuple[np.ndarray, np.ndarray], pages: np.ndarray) -> None:
        """Write new pages, one group after another, to these `(indices, page numbers)` of each self-attention group."""
        for group, of_group in zip(self.self_attention, pages.reshape(len(self.self_attention), -1), strict=True):
            self.seqs.page_tables[group][places] = of_group

    def next_full_pages(
        self, indices: np.ndarray, computed: np.ndarray, token_ids: ArrayLike | None
    ) -> FullPages | None:
        """Hash the pages that become full when each sequence has `computed` tokens; `None` if there are none.

        Sets the token ids if they are given, and changes nothing else.

        Raises:
            ValueError: `token_ids` contradict the known ids; nothing changes.
        """
        if token_ids is None:
            return self._hash_full_pages(indices, computed)
        before = self.seqs.computed[indices]
        places = ragged(indices, before, computed - before)
        known = self.seqs.set_token_ids(places, token_ids)
        try:
            return self._hash_full_pages(indices, computed)
        except MemoryError:
            self.seqs.token_ids[places] = known
            raise

    def index_full_pages(self, full: FullPages) -> None:
        """Index pages that have become full, except those with unknown tokens."""
        indices, pages = full.places
        self.seqs.num_full_pages[indices] = pages + 1  # several pages of a sequence: the last one counts
        for index, (page_hash, _, _, _) in zip(indices.tolist(), full.contents, strict=True):
            if page_hash:
                self.seqs.hashes[index].append(page_hash)
        self._index_pages(full)

    def reindex_full_pages(self, index: int) -> None:
        """Index those full pages of a sequence that have a hash and are not indexed.

        They were swapped in, or another page with the same content was indexed when they became full.
        """
        tables = self.seqs.page_tables[self.self_attention, index, : max(len(self.seqs.hashes[index]) - 1, 0)]
        pages = np.flatnonzero(((tables > 0) & ~self.pages.index.is_indexed[tables]).any(axis=0))
        if len(pages):
            places = np.full(len(pages), index), pages
            self._index_pages(FullPages(places, self._hashed_contents(places)))

    def index_partial_page(self, index: int) -> None:
        """Index the tail page of a sequence that ends, if the page is private and its tokens are known."""
        computed, hashes = int(self.seqs.computed[index]), self.seqs.hashes[index]
        page, start = computed // self.page_size, computed // self.page_size * self.page_size
        ids = self.seqs.token_ids[index, start:computed]
        known = len(hashes) == page + 1 and len(ids) and ids.min() > UNKNOWN
        if known and not media_bytes(self.seqs.media[index], start, computed):
            for group in self.self_attention:
                page_id = int(self.seqs.page_tables[group, index, page])
                if page_id and self.pages.pool.refcounts(page_id) == 1:
                    self.pages.add_partial_to_index(group, page_id, (b"", hashes[page], ids.tobytes(), b""))

    def release_out_of_window(self, indices: np.ndarray) -> None:
        """Release the pages that no query after the computed tokens sees."""
        if self.windowed:
            self.release_out_of_window_after(indices, self.seqs.computed[indices])

    def release_out_of_window_after(self, indices: np.ndarray, num_tokens: np.ndarray) -> None:
        """Release the pages that no query after `num_tokens` tokens of each sequence sees."""
        for group in self.windowed:
            first = self.seqs.first_page[group, indices]
            needed = np.maximum(first, self.groups[group].first_needed(num_tokens) // self.page_size)
            unseen = needed - first
            if unseen.any():
                places = ragged(indices, first, unseen)
                self.pages.release(self.seqs.page_tables[group][places])
                self.seqs.page_tables[group][places] = 0
                self.seqs.first_page[group, indices] = needed

    def check_cross_tokens(self, cross_tokens: int) -> int:
        """Return `cross_tokens`, if they fit the groups.

        Raises:
            ValueError: there are cross-attention groups but no tokens, tokens but no such group, or too many tokens.
        """
        cross_tokens = check_integer("cross_tokens", cross_tokens, least=1 if self.cross_attention else 0)
        if cross_tokens and not self.cross_attention:
            raise ValueError(f"cross_tokens={cross_tokens} must be 0: there is no cross-attention group")
        self.seqs.check_lengths(cross_tokens)
        return cross_tokens

    def check_window(self, index: int, num_tokens: int) -> None:
        """Check that a sequence can go back to `num_tokens` tokens.

        Raises:
            ValueError: a window would need pages that were released.
        """
        for group in self.windowed:
            first_token = int(self.seqs.first_page[group, index]) * self.page_size
            if self.groups[group].first_needed(num_tokens) < first_token:
                raise ValueError(
                    f"num_tokens={num_tokens} is too far back: {self.groups[group].kind} layers have released "
                    f"all pages before token {first_token}; admit the tokens anew, or truncate before commit"
                )

    def truncate(self, index: int, num_tokens: int) -> None:
        """Shorten a sequence to its first `num_tokens` tokens, and release the other pages."""
        start, stop = self.num_pages(num_tokens), self.num_pages(int(self.seqs.lengths[index]))
        self._release_spans(index, [(group, start, stop) for group in self.self_attention])
        self.seqs.truncate(index, num_tokens)

    def release_all(self, index: int) -> None:
        """Release all pages of a sequence."""
        self._release_spans(index, self._spans(index))

    def swap_out(self, index: int, host_pages: np.ndarray) -> None:
        """Log moves of a sequence's pages to these host pages, and release the pages."""
        by_group = self.pages_of(index)
        pages = np.concatenate(by_group)
        self.pages.log.add("out", pages, host_pages)
        self.pages.counts.swapped_out += len(pages)
        for group, of_group in enumerate(by_group):
            self.pages.add_swap_events("swapped_out", of_group, group)
        self.release_all(index)
        self.seqs.host_pages[index] = host_pages

    def swap_in(self, index: int, pages: np.ndarray) -> np.ndarray:
        """Log moves of a sequence's host pages to new pages. Returns the host pages, which the caller releases."""
        host_pages = self.seqs.host_pages.pop(index)
        self.pages.log.add("in", host_pages, pages)
        self.pages.counts.swapped_in += len(pages)
        for group, start, stop in self._spans(index):
            of_group, pages = np.split(pages, [stop - start])
            self.seqs.page_tables[group, index, start:stop] = of_group
            self.pages.add_swap_events("swapped_in", of_group, group)
        return host_pages

    def unused_slots(self) -> int:
        """Unused slots in last pages; a shared page counts from its longest sequence."""
        pages, filled = self._partial_pages()
        each, at, times = np.unique(pages, return_inverse=True, return_counts=True)
        most = np.zeros(len(each), np.int64)
        np.maximum.at(most, at, filled)
        # Where the refcount is higher, the page is full for another sequence or for a pin.
        return int((self.page_size - most)[self.pages.pool.refcounts(each) == times].sum())

    def _partial_pages(self) -> tuple[np.ndarray, np.ndarray]:
        """The last pages that are not full, of all sequences and groups, and the number of tokens in each."""
        indices = self.seqs.all_on_device()
        pages, filled = [], []
        for group, each in enumerate(self.groups):
            lengths = (self.seqs.lengths if each.is_self_attention else self.seqs.cross_tokens)[indices]
            inside = np.flatnonzero(lengths % self.page_size)
            pages.append(self.seqs.page_tables[group, indices[inside], lengths[inside] // self.page_size])
            filled.append(lengths[inside] % self.page_size)
        return np.concatenate(pages), np.concatenate(filled)

    def _release_spans(self, index: int, spans: list[tuple[int, int, int]]) -> None:
        """Release pages of a sequence: in each `(group, start, stop)`, page numbers `start .. stop - 1`."""
        entries = [self.seqs.page_tables[group, index, start:stop] for group, start, stop in spans]
        self.pages.release(last_pages_first(entries))
        for of_group in entries:
            of_group[:] = 0

    def _spans(self, index: int) -> list[tuple[int, int, int]]:
        """For each group `(group, start, stop)`: the sequence has page numbers `start .. stop - 1`."""
        own = int(self.num_pages(self.seqs.lengths[index]))
        cross = int(self.num_pages(self.seqs.cross_tokens[index]))
        ends = [own if group.is_self_attention else cross for group in self.groups]
        return [(group, int(self.seqs.first_page[group, index]), end) for group, end in enumerate(ends)]

    def _hash_full_pages(self, indices: np.ndarray, computed: np.ndarray) -> FullPages | None:
        """Hash the pages that become full when each sequence has `computed` tokens; `None` if there are none."""
        before, now = self.seqs.num_full_pages[indices], computed // self.page_size
        (filled,) = (now > before).nonzero()
        if not (self.prefix_reuse and len(filled)):
            return None
        places = ragged(indices[filled], before[filled], now[filled] - before[filled])
        return FullPages(places, self.seqs.hash_pages(places))

    def _hashed_contents(self, places: tuple[np.ndarray, np.ndarray]) -> list[Content]:
        """The contents of full pages whose hashes are known."""
        indices, pages = (place.tolist() for place in places)
        return [
            (hashes[page + 1], hashes[page], token_ids, self.seqs.page_media(index, page))
            for index, page, token_ids in zip(indices, pages, self.seqs.page_token_bytes(places), strict=True)
            for hashes in [self.seqs.hashes[index]]
        ]

    def _index_pages(self, full: FullPages) -> None:
        """Index full pages in every self-attention group that has them."""
        for group in self.self_attention:
            self.pages.add_to_index(group, self.seqs.page_tables[group][full.places], full.contents)

    def _new_page_numbers(
        self, indices: np.ndarray, lengths: np.ndarray, ends: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The `(indices, page numbers)` that sequences need to grow from `lengths` to `ends` tokens."""
        present = self.num_pages(lengths)
        new = self.num_pages(ends) - present
        (more,) = new.nonzero()
        return ragged(indices[more], present[more], new[more])

    def _tails(self, indices: np.ndarray) -> np.ndarray:
        """The tail pages of sequences, `[self-attention groups, n]`; 0 where the next token begins a page."""
        numbers = self.seqs.lengths[indices] // self.page_size
        return np.array([self.seqs.page_tables[group][indices, numbers] for group in self.self_attention])

    def _shared_tails(self, indices: np.ndarray) -> list[tuple[int, int]]:
        """The `(group, index)` of the tail pages that must be copied before these sequences write them.

        If all sequences that share a page write it now, the last of them keeps the page, and the others get copies.
        """
        if not len(indices):
            return []
        tails = self._tails(indices)
        refcounts = self.pages.pool.refcounts(tails)
        shared, left = [], dict[int, int]()
        for group, at in np.argwhere(refcounts > 1).tolist():
            page = int(tails[group, at])
            left[page] = left.get(page, int(refcounts[group, at])) - 1
            if left[page]:
                shared.append((self.self_attention[group], int(indices[at])))
        return shared

    def _make_tails_private(self, indices: np.ndarray, shared: list[tuple[int, int]], copies: np.ndarray) -> None:
        """Make the tail pages of these sequences private: copy the shared ones, and drop the rest from the index."""
        if not len(indices):
            return
        if shared:
            groups, shared_rows = np.array(shared).T
            self._copy_tails(groups, shared_rows, copies)
        tails = self._tails(indices)
        self.pages.remove_from_index(tails[self.pages.index.is_indexed[tails]])
        self.seqs.has_private_tail[indices] = True

    def _copy_tails(self, groups: np.ndarray, indices: np.ndarray, copies: np.ndarray) -> None:
        """Replace the tail pages of these groups and sequences by copies."""
        places = (groups, indices, self.seqs.lengths[indices] // self.page_size)
        shared = self.seqs.page_tables[places]
        self.pages.copy(shared, copies)
        self.seqs.page_tables[places] = copies
        self.pages.release(shared)


def last_pages_first(pages: Sequence[np.ndarray]) -> np.ndarray:
    """All groups' pages of a prefix, the end of the prefix first: the order in which to release and evict them.

    A page is of no use without the pages before it, in its own group and in the others.

    >>> last_pages_first([np.array([1, 2, 3]), np.array([8, 9])])
    array([3, 9, 2, 8, 1])
    """
    from_end = np.concatenate([np.arange(len(of_group))[::-1] for of_group in pages])
    return np.concatenate(pages)[np.argsort(from_end, kind="stable")]
