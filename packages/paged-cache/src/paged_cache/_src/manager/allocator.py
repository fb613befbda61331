"""Which pages each sequence holds, group by group: the steps that operations of the manager consist of."""

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
    """Their indices and table entries."""
    contents: list[Content]
    """What they hold, and what they are found by."""


class Allocator:
    """Sequences and pages, kept in step. `indices` are indices of `seqs`; what can be wrong has been checked before.

    table entries of a index | 0 .. 0 | pages | 0 .. 0 |
                           0        first   ceil(length / page_size)
    """

    def __init__(self, seqs: Sequences, pages: Pages, groups: Sequence[LayerGroup], *, prefix_reuse: bool) -> None:
        """Nothing is held yet; without `prefix_reuse` no index has keys, so none is found.

        Raises:
            ValueError: no group grows.
        """
        if not any(group.is_self_attention for group in groups):
            raise ValueError(f"groups={groups} must have one that grows: full, window or chunked")
        self.seqs = seqs
        self.pages = pages
        self.groups = tuple(groups)
        self.page_size = seqs.page_size
        self.prefix_reuse = prefix_reuse
        self.self_attention = [index for index, group in enumerate(groups) if group.is_self_attention]
        self.cross_attention = tuple(index for index, group in enumerate(groups) if not group.is_self_attention)
        self.windowed = [index for index, group in enumerate(groups) if group.is_windowed]

    def num_pages(self, tokens: Count) -> Count:
        """Pages that hold so many tokens."""
        return -(-tokens // self.page_size)

    def pages_of(self, index: int) -> list[np.ndarray]:
        """The pages of a index, by group."""
        return [self.seqs.page_tables[group, index, start:stop] for group, start, stop in self._spans(index)]

    def can_reuse(self, prompt: Prompt) -> bool:
        """Whether a prompt says all that its keys and values depend on: with cross-attention, what that sees too."""
        return self.prefix_reuse and (not self.cross_attention or bool(media_bytes(prompt.media, 0, 1)))

    def add(self, new: Admission) -> int:
        """The id of a new sequence that starts with what was found; there are pages enough."""
        hit = new.hit
        found = np.concatenate([*hit.pages, hit.tails])
        self.pages.share(found)  # so that they are not evicted for the new ones
        num_new = self.num_pages(new.length) - hit.num_pages
        num_cross = self.num_pages(new.cross_tokens)
        pages = self.pages.allocate(num_new * len(self.self_attention) + num_cross * len(self.cross_attention))
        grown, crossed = np.split(pages, [num_new * len(self.self_attention)])
        index, seq = self.seqs.add(new)
        if not self.can_reuse(new.prompt):
            self.seqs.hashes[index].clear()
        for group in self.self_attention:
            first = hit.num_pages - len(hit.pages[group])
            self.seqs.first_page[group, index] = first
            self.seqs.page_tables[group, index, first : hit.num_pages] = hit.pages[group]
        self.fill_page_tables(ragged(np.array([index]), np.array([hit.num_pages]), np.array([num_new])), grown)
        for at, group in enumerate(self.cross_attention):
            self.seqs.page_tables[group, index, :num_cross] = crossed[at * num_cross : (at + 1) * num_cross]
        if len(hit.tails):
            self.pages.copy(hit.tails, grown.reshape(len(self.self_attention), -1)[:, 0])
            self.pages.release(hit.tails)
        return seq

    def grow(self, indices: np.ndarray, counts: np.ndarray, token_ids: ArrayLike | None) -> None:
        """Slots for these tokens, one index's after another's, in pages that the index alone owns and nobody can find.

        Raises:
            OutOfPages: not enough pages are free; nothing changes.
            ValueError: a index would be too long, or `token_ids` are not so many tokens; nothing changes.
        """
        lengths = self.seqs.lengths[indices]
        ends = lengths + counts
        self.seqs.check_lengths(ends)
        places = ragged(indices, lengths, counts)
        tokens = UNKNOWN if token_ids is None else check_tokens(token_ids, len(places[0]))
        doubtful = indices[~self.seqs.has_private_tail[indices]]
        shared = self._shared_tails(doubtful)
        entries = self._new_entries(indices, lengths, ends)
        pages = self.pages.allocate(len(shared) + len(entries[0]) * len(self.self_attention))
        self._make_tails_private(doubtful, shared, pages[: len(shared)])
        self.fill_page_tables(entries, pages[len(shared) :])
        self.seqs.token_ids[places] = tokens
        self.seqs.lengths[indices] = ends

    def fill_page_tables(self, places: tuple[np.ndarray, np.ndarray], pages: np.ndarray) -> None:
        """New pages, one group's after another's, at these places of each growing group's table."""
        for group, of_group in zip(self.self_attention, pages.reshape(len(self.self_attention), -1), strict=True):
            self.seqs.page_tables[group][places] = of_group

    def next_full_pages(
        self, indices: np.ndarray, computed: np.ndarray, token_ids: ArrayLike | None
    ) -> FullPages | None:
        """Pages that become full when `computed` tokens of these sequences are computed; also sets the token ids.

        Raises:
            ValueError: `token_ids` are not the new tokens; nothing changes.
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
        """Let pages that have become full be found, as far as their tokens are known."""
        indices, pages = full.places
        self.seqs.num_full_pages[indices] = pages + 1  # a index's last page comes last
        for index, (page_hash, _, _, _) in zip(indices.tolist(), full.contents, strict=True):
            if page_hash:
                self.seqs.hashes[index].append(page_hash)
        self._index_pages(full)

    def reindex_full_pages(self, index: int) -> None:
        """Let pages of a index be found that have keys and are not: they are new, or another's was when they filled."""
        tables = self.seqs.page_tables[self.self_attention, index, : max(len(self.seqs.hashes[index]) - 1, 0)]
        pages = np.flatnonzero(((tables > 0) & ~self.pages.index.is_indexed[tables]).any(axis=0))
        if len(pages):
            places = np.full(len(pages), index), pages
            self._index_pages(FullPages(places, self._hashed_contents(places)))

    def index_partial_page(self, index: int) -> None:
        """Let the last page of a index be found by what it begins with, if the index is its last owner."""
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
        """Give back the pages that no query after the computed tokens sees."""
        if self.windowed:
            self.release_out_of_window_after(indices, self.seqs.computed[indices])

    def release_out_of_window_after(self, indices: np.ndarray, num_tokens: np.ndarray) -> None:
        """Give back the pages that no query after so many tokens of each index sees."""
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
        """A number of tokens that the groups can see.

        Raises:
            ValueError: there are such groups and no tokens, tokens and no such group, or too many tokens.
        """
        cross_tokens = check_integer("cross_tokens", cross_tokens, least=1 if self.cross_attention else 0)
        if cross_tokens and not self.cross_attention:
            raise ValueError(f"cross_tokens={cross_tokens} must be 0: there is no group of cross-attention")
        self.seqs.check_lengths(cross_tokens)
        return cross_tokens

    def check_window(self, index: int, num_tokens: int) -> None:
        """Refuse to go back to where pages are needed that have been returned.

        Raises:
            ValueError: the index cannot go back to `num_tokens` tokens.
        """
        for group in self.windowed:
            kept_from = int(self.seqs.first_page[group, index]) * self.page_size
            if self.groups[group].first_needed(num_tokens) < kept_from:
                raise ValueError(
                    f"num_tokens={num_tokens} is too far back: {self.groups[group].kind} layers have returned "
                    f"all before token {kept_from}; admit the tokens anew, or truncate before commit"
                )

    def truncate(self, index: int, num_tokens: int) -> None:
        """Only the first `num_tokens` tokens of a index stay, and their pages."""
        start, stop = self.num_pages(num_tokens), self.num_pages(int(self.seqs.lengths[index]))
        self._release_spans(index, [(group, start, stop) for group in self.self_attention])
        self.seqs.truncate(index, num_tokens)

    def release_all(self, index: int) -> None:
        """Give back all pages of a index."""
        self._release_spans(index, self._spans(index))

    def swap_out(self, index: int, host_pages: np.ndarray) -> None:
        """What the index's pages hold goes to these host pages, and the pages are given back."""
        held = self.pages_of(index)
        pages = np.concatenate(held)
        self.pages.log.add("out", pages, host_pages)
        self.pages.counts.swapped_out += len(pages)
        for group, of_group in enumerate(held):
            self.pages.add_swap_events("swapped_out", of_group, group)
        self.release_all(index)
        self.seqs.host_pages[index] = host_pages

    def swap_in(self, index: int, pages: np.ndarray) -> np.ndarray:
        """These pages take what the index has on the host, and are its own; returns the host pages."""
        host_pages = self.seqs.host_pages.pop(index)
        self.pages.log.add("in", host_pages, pages)
        self.pages.counts.swapped_in += len(pages)
        for group, start, stop in self._spans(index):
            of_group, pages = np.split(pages, [stop - start])
            self.seqs.page_tables[group, index, start:stop] = of_group
            self.pages.add_swap_events("swapped_in", of_group, group)
        return host_pages

    def unused_slots(self) -> int:
        """Slots of owned pages that are behind the last token of every owner; a page whose owner goes on is full."""
        pages, filled = self._partial_pages()
        each, place, times = np.unique(pages, return_inverse=True, return_counts=True)
        most = np.zeros(len(each), np.int64)
        np.maximum.at(most, place, filled)
        return int((self.page_size - most)[self.pages.pool.refcounts(each) == times].sum())

    def _partial_pages(self) -> tuple[np.ndarray, np.ndarray]:
        """Last pages of all indices, where they are not full, and how many tokens of the index are in them."""
        indices = self.seqs.all_on_device()
        pages, filled = [], []
        for group, each in enumerate(self.groups):
            lengths = (self.seqs.lengths if each.is_self_attention else self.seqs.cross_tokens)[indices]
            inside = np.flatnonzero(lengths % self.page_size)
            pages.append(self.seqs.page_tables[group, indices[inside], lengths[inside] // self.page_size])
            filled.append(lengths[inside] % self.page_size)
        return np.concatenate(pages), np.concatenate(filled)

    def _release_spans(self, index: int, spans: list[tuple[int, int, int]]) -> None:
        """Give back pages of a index: of each group, the table entries from a first to a last, exclusive."""
        entries = [self.seqs.page_tables[group, index, start:stop] for group, start, stop in spans]
        self.pages.release(last_pages_first(entries))
        for of_group in entries:
            of_group[:] = 0

    def _spans(self, index: int) -> list[tuple[int, int, int]]:
        """Each group with the first and the last table entry, exclusive, that are pages of the index."""
        grown = int(self.num_pages(self.seqs.lengths[index]))
        crossed = int(self.num_pages(self.seqs.cross_tokens[index]))
        ends = [grown if group.is_self_attention else crossed for group in self.groups]
        return [(group, int(self.seqs.first_page[group, index]), end) for group, end in enumerate(ends)]

    def _hash_full_pages(self, indices: np.ndarray, computed: np.ndarray) -> FullPages | None:
        """The pages that become full when so many tokens of these sequences are computed; changes nothing."""
        before, now = self.seqs.num_full_pages[indices], computed // self.page_size
        (filled,) = (now > before).nonzero()
        if not (self.prefix_reuse and len(filled)):
            return None
        places = ragged(indices[filled], before[filled], now[filled] - before[filled])
        return FullPages(places, self.seqs.hash_pages(places))

    def _hashed_contents(self, places: tuple[np.ndarray, np.ndarray]) -> list[Content]:
        """What full pages that have keys hold, and what they are found by."""
        indices, pages = (place.tolist() for place in places)
        return [
            (hashes[page + 1], hashes[page], token_ids, self.seqs.page_media(index, page))
            for index, page, token_ids in zip(indices, pages, self.seqs.page_token_bytes(places), strict=True)
            for hashes in [self.seqs.hashes[index]]
        ]

    def _index_pages(self, full: FullPages) -> None:
        """Let full pages be found, in all groups that have them."""
        for group in self.self_attention:
            self.pages.add_to_index(group, self.seqs.page_tables[group][full.places], full.contents)

    def _new_entries(self, indices: np.ndarray, lengths: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows and table entries of the pages that indices need when they go on from `lengths` to `ends` tokens."""
        held = self.num_pages(lengths)
        new = self.num_pages(ends) - held
        (more,) = new.nonzero()
        return ragged(indices[more], held[more], new[more])

    def _tails(self, indices: np.ndarray) -> np.ndarray:
        """The page that the next token of each index goes into, `[growing groups, n]`; 0 where it begins a page."""
        entries = self.seqs.lengths[indices] // self.page_size
        return np.array([self.seqs.page_tables[group][indices, entries] for group in self.self_attention])

    def _shared_tails(self, indices: np.ndarray) -> list[tuple[int, int]]:
        """Groups and indices whose last page others have too, which is about to be written.

        Of the indices that share a page and all write it now, the last may have it, if nobody else does.
        """
        if not len(indices):
            return []
        tails = self._tails(indices)
        owners = self.pages.pool.refcounts(tails)
        shared, left = [], dict[int, int]()
        for group, at in np.argwhere(owners > 1).tolist():
            page = int(tails[group, at])
            left[page] = left.get(page, int(owners[group, at])) - 1
            if left[page]:
                shared.append((self.self_attention[group], int(indices[at])))
        return shared

    def _make_tails_private(self, indices: np.ndarray, shared: list[tuple[int, int]], copies: np.ndarray) -> None:
        """The last pages of these indices become theirs alone, those that are shared by copying; nobody finds them."""
        if not len(indices):
            return
        if shared:
            groups, shared_rows = np.array(shared).T
            self._copy_tails(groups, shared_rows, copies)
        tails = self._tails(indices)
        self.pages.remove_from_index(tails[self.pages.index.is_indexed[tails]])
        self.seqs.has_private_tail[indices] = True

    def _copy_tails(self, groups: np.ndarray, indices: np.ndarray, copies: np.ndarray) -> None:
        """These groups' and indices' last pages are copied, and the copies are theirs."""
        places = (groups, indices, self.seqs.lengths[indices] // self.page_size)
        shared = self.seqs.page_tables[places]
        self.pages.copy(shared, copies)
        self.seqs.page_tables[places] = copies
        self.pages.release(shared)


def last_pages_first(pages: Sequence[np.ndarray]) -> np.ndarray:
    """All groups' pages of a prefix, those at its end first: so they are to be released, and then evicted.

    Neither a page nor another group's is of use without the pages before it.

    >>> last_pages_first([np.array([1, 2, 3]), np.array([8, 9])])
    array([3, 9, 2, 8, 1])
    """
    behind = np.concatenate([np.arange(len(of_group))[::-1] for of_group in pages])
    return np.concatenate(pages)[np.argsort(behind, kind="stable")]
