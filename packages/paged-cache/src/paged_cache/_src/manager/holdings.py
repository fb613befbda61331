"""Which pages each sequence holds, group by group: the steps that operations of the manager consist of."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from paged_cache._src.manager.arrays import ragged
from paged_cache._src.manager.groups import Count, LayerGroup
from paged_cache._src.manager.pages import Pages
from paged_cache._src.manager.prefix import Content, media_bytes
from paged_cache._src.manager.prompt import Prompt, check_tokens
from paged_cache._src.manager.reuse import Admission
from paged_cache._src.manager.sequences import UNKNOWN, Sequences, check_whole


class FullPages(NamedTuple):
    """Pages that have become full, in order."""

    places: tuple[np.ndarray, np.ndarray]
    """Their rows and table entries."""
    contents: list[Content]
    """What they hold, and what they are found by."""


class Holdings:
    """Sequences and pages, kept in step. `rows` are rows of `seqs`; what can be wrong has been checked before.

    table entries of a row | 0 .. 0 | pages | 0 .. 0 |
                           0        first   ceil(length / page_size)
    """

    def __init__(self, seqs: Sequences, pages: Pages, groups: Sequence[LayerGroup], *, prefix_reuse: bool) -> None:
        """Nothing is held yet; without `prefix_reuse` no row has keys, so none is found.

        Raises:
            ValueError: no group grows.
        """
        if not any(group.grows for group in groups):
            raise ValueError(f"groups={groups} must have one that grows: full, window or chunked")
        self.seqs = seqs
        self.pages = pages
        self.groups = tuple(groups)
        self.page_size = seqs.page_size
        self.prefix_reuse = prefix_reuse
        self.growing = [index for index, group in enumerate(groups) if group.grows]
        self.cross = tuple(index for index, group in enumerate(groups) if not group.grows)
        self.forgetting = [index for index, group in enumerate(groups) if group.forgets]

    def num_pages(self, tokens: Count) -> Count:
        """Pages that hold so many tokens."""
        return -(-tokens // self.page_size)

    def of(self, row: int) -> list[np.ndarray]:
        """The pages of a row, by group."""
        return [self.seqs.tables[group, row, start:stop] for group, start, stop in self._spans(row)]

    def can_share(self, prompt: Prompt) -> bool:
        """Whether a prompt says all that its keys and values depend on: with cross-attention, what that sees too."""
        return self.prefix_reuse and (not self.cross or bool(media_bytes(prompt.media, 0, 1)))

    def add(self, new: Admission) -> int:
        """The id of a new sequence that starts with what was found; there are pages enough."""
        reuse = new.reuse
        found = np.concatenate([*reuse.pages, reuse.tails])
        self.pages.share(found)  # so that they are not evicted for the new ones
        num_new = self.num_pages(new.length) - reuse.num_pages
        num_cross = self.num_pages(new.cross_tokens)
        pages = self.pages.allocate(num_new * len(self.growing) + num_cross * len(self.cross))
        grown, crossed = np.split(pages, [num_new * len(self.growing)])
        row, seq = self.seqs.add(new)
        if not self.can_share(new.prompt):
            self.seqs.keys[row].clear()
        for group in self.growing:
            first = reuse.num_pages - len(reuse.pages[group])
            self.seqs.first[group, row] = first
            self.seqs.tables[group, row, first : reuse.num_pages] = reuse.pages[group]
        self.put_pages(ragged(np.array([row]), np.array([reuse.num_pages]), np.array([num_new])), grown)
        for at, group in enumerate(self.cross):
            self.seqs.tables[group, row, :num_cross] = crossed[at * num_cross : (at + 1) * num_cross]
        if len(reuse.tails):
            self.pages.copy(reuse.tails, grown.reshape(len(self.growing), -1)[:, 0])
            self.pages.release(reuse.tails)
        return seq

    def grow(self, rows: np.ndarray, counts: np.ndarray, token_ids: ArrayLike | None) -> None:
        """Slots for these tokens, one row's after another's, in pages that the row alone owns and nobody can find.

        Raises:
            OutOfPages: not enough pages are free; nothing changes.
            ValueError: a row would be too long, or `token_ids` are not so many tokens; nothing changes.
        """
        lengths = self.seqs.lengths[rows]
        ends = lengths + counts
        self.seqs.check_lengths(ends)
        places = ragged(rows, lengths, counts)
        tokens = UNKNOWN if token_ids is None else check_tokens(token_ids, len(places[0]))
        doubtful = rows[~self.seqs.owns_tail[rows]]
        shared = self._shared_tails(doubtful)
        entries = self._new_entries(rows, lengths, ends)
        pages = self.pages.allocate(len(shared) + len(entries[0]) * len(self.growing))
        self._own_tails(doubtful, shared, pages[: len(shared)])
        self.put_pages(entries, pages[len(shared) :])
        self.seqs.token_ids[places] = tokens
        self.seqs.lengths[rows] = ends

    def put_pages(self, places: tuple[np.ndarray, np.ndarray], pages: np.ndarray) -> None:
        """New pages, one group's after another's, at these places of each growing group's table."""
        for group, of_group in zip(self.growing, pages.reshape(len(self.growing), -1), strict=True):
            self.seqs.tables[group][places] = of_group

    def next_full_pages(self, rows: np.ndarray, computed: np.ndarray, token_ids: ArrayLike | None) -> FullPages | None:
        """The pages that become full when so many tokens of these rows are computed; the new ones are known afterwards.

        Raises:
            ValueError: `token_ids` are not the new tokens; nothing changes.
        """
        if token_ids is None:
            return self._name_full_pages(rows, computed)
        before = self.seqs.computed[rows]
        places = ragged(rows, before, computed - before)
        known = self.seqs.learn(places, token_ids)
        try:
            return self._name_full_pages(rows, computed)
        except MemoryError:
            self.seqs.token_ids[places] = known
            raise

    def keep_full_pages(self, full: FullPages) -> None:
        """Let pages that have become full be found, as far as their tokens are known."""
        rows, pages = full.places
        self.seqs.num_full[rows] = pages + 1  # a row's last page comes last
        for row, (key, _, _, _) in zip(rows.tolist(), full.contents, strict=True):
            if key:
                self.seqs.keys[row].append(key)
        self._keep(full)

    def keep_full_pages_again(self, row: int) -> None:
        """Let pages of a row be found that have keys and are not: they are new, or another's was when they filled."""
        tables = self.seqs.tables[self.growing, row, : max(len(self.seqs.keys[row]) - 1, 0)]
        pages = np.flatnonzero(((tables > 0) & ~self.pages.index.holds[tables]).any(axis=0))
        if len(pages):
            places = np.full(len(pages), row), pages
            self._keep(FullPages(places, self._named_before(places)))

    def keep_partial_page(self, row: int) -> None:
        """Let the last page of a row be found by what it begins with, if the row is its last owner."""
        computed, keys = int(self.seqs.computed[row]), self.seqs.keys[row]
        page, start = computed // self.page_size, computed // self.page_size * self.page_size
        ids = self.seqs.token_ids[row, start:computed]
        known = len(keys) == page + 1 and len(ids) and ids.min() > UNKNOWN
        if known and not media_bytes(self.seqs.media[row], start, computed):
            for group in self.growing:
                page_id = int(self.seqs.tables[group, row, page])
                if page_id and self.pages.pool.owners(page_id) == 1:
                    self.pages.keep_partial(group, page_id, (b"", keys[page], ids.tobytes(), b""))

    def return_unseen(self, rows: np.ndarray) -> None:
        """Give back the pages that no query after the computed tokens sees."""
        if self.forgetting:
            self.return_unseen_after(rows, self.seqs.computed[rows])

    def return_unseen_after(self, rows: np.ndarray, num_tokens: np.ndarray) -> None:
        """Give back the pages that no query after so many tokens of each row sees."""
        for group in self.forgetting:
            first = self.seqs.first[group, rows]
            needed = np.maximum(first, self.groups[group].first_needed(num_tokens) // self.page_size)
            unseen = needed - first
            if unseen.any():
                places = ragged(rows, first, unseen)
                self.pages.release(self.seqs.tables[group][places])
                self.seqs.tables[group][places] = 0
                self.seqs.first[group, rows] = needed

    def check_cross_tokens(self, cross_tokens: int) -> int:
        """A number of tokens that the groups can see.

        Raises:
            ValueError: there are such groups and no tokens, tokens and no such group, or too many tokens.
        """
        cross_tokens = check_whole("cross_tokens", cross_tokens, least=1 if self.cross else 0)
        if cross_tokens and not self.cross:
            raise ValueError(f"cross_tokens={cross_tokens} must be 0: there is no group of cross-attention")
        self.seqs.check_lengths(cross_tokens)
        return cross_tokens

    def check_window(self, row: int, num_tokens: int) -> None:
        """Refuse to go back to where pages are needed that have been returned.

        Raises:
            ValueError: the row cannot go back to `num_tokens` tokens.
        """
        for group in self.forgetting:
            kept_from = int(self.seqs.first[group, row]) * self.page_size
            if self.groups[group].first_needed(num_tokens) < kept_from:
                raise ValueError(
                    f"num_tokens={num_tokens} is too far back: {self.groups[group].kind} layers have returned "
                    f"all before token {kept_from}; admit the tokens anew, or truncate before commit"
                )

    def cut(self, row: int, num_tokens: int) -> None:
        """Only the first `num_tokens` tokens of a row stay, and their pages."""
        start, stop = self.num_pages(num_tokens), self.num_pages(int(self.seqs.lengths[row]))
        self._give_back(row, [(group, start, stop) for group in self.growing])
        self.seqs.cut(row, num_tokens)

    def give_back_all(self, row: int) -> None:
        """Give back all pages of a row."""
        self._give_back(row, self._spans(row))

    def to_host(self, row: int, host_pages: np.ndarray) -> None:
        """What the row's pages hold goes to these host pages, and the pages are given back."""
        held = self.of(row)
        pages = np.concatenate(held)
        self.pages.log.add("out", pages, host_pages)
        self.pages.counts.swapped_out += len(pages)
        for group, of_group in enumerate(held):
            self.pages.note_swap("swapped_out", of_group, group)
        self.give_back_all(row)
        self.seqs.host_pages[row] = host_pages

    def from_host(self, row: int, pages: np.ndarray) -> np.ndarray:
        """These pages take what the row has on the host, and are its own; returns the host pages."""
        host_pages = self.seqs.host_pages.pop(row)
        self.pages.log.add("in", host_pages, pages)
        self.pages.counts.swapped_in += len(pages)
        for group, start, stop in self._spans(row):
            of_group, pages = np.split(pages, [stop - start])
            self.seqs.tables[group, row, start:stop] = of_group
            self.pages.note_swap("swapped_in", of_group, group)
        return host_pages

    def empty_slots(self) -> int:
        """Slots of owned pages that are behind the last token of every owner; a page whose owner goes on is full."""
        pages, filled = self._last_pages()
        each, place, times = np.unique(pages, return_inverse=True, return_counts=True)
        most = np.zeros(len(each), np.int64)
        np.maximum.at(most, place, filled)
        return int((self.page_size - most)[self.pages.pool.owners(each) == times].sum())

    def _last_pages(self) -> tuple[np.ndarray, np.ndarray]:
        """Last pages of all rows, where they are not full, and how many tokens of the row are in them."""
        rows = self.seqs.rows_with_pages()
        pages, filled = [], []
        for group, each in enumerate(self.groups):
            lengths = (self.seqs.lengths if each.grows else self.seqs.cross_tokens)[rows]
            inside = np.flatnonzero(lengths % self.page_size)
            pages.append(self.seqs.tables[group, rows[inside], lengths[inside] // self.page_size])
            filled.append(lengths[inside] % self.page_size)
        return np.concatenate(pages), np.concatenate(filled)

    def _give_back(self, row: int, spans: list[tuple[int, int, int]]) -> None:
        """Give back pages of a row: of each group, the table entries from a first to a last, exclusive."""
        entries = [self.seqs.tables[group, row, start:stop] for group, start, stop in spans]
        self.pages.release(ends_first(entries))
        for of_group in entries:
            of_group[:] = 0

    def _spans(self, row: int) -> list[tuple[int, int, int]]:
        """Each group with the first and the last table entry, exclusive, that are pages of the row."""
        grown = int(self.num_pages(self.seqs.lengths[row]))
        crossed = int(self.num_pages(self.seqs.cross_tokens[row]))
        ends = [grown if group.grows else crossed for group in self.groups]
        return [(group, int(self.seqs.first[group, row]), end) for group, end in enumerate(ends)]

    def _name_full_pages(self, rows: np.ndarray, computed: np.ndarray) -> FullPages | None:
        """The pages that become full when so many tokens of these rows are computed; changes nothing."""
        before, now = self.seqs.num_full[rows], computed // self.page_size
        (filled,) = (now > before).nonzero()
        if not (self.prefix_reuse and len(filled)):
            return None
        places = ragged(rows[filled], before[filled], now[filled] - before[filled])
        return FullPages(places, self.seqs.name(places))

    def _named_before(self, places: tuple[np.ndarray, np.ndarray]) -> list[Content]:
        """What full pages that have keys hold, and what they are found by."""
        rows, pages = (place.tolist() for place in places)
        return [
            (keys[page + 1], keys[page], token_ids, self.seqs.page_media(row, page))
            for row, page, token_ids in zip(rows, pages, self.seqs.page_tokens(places), strict=True)
            for keys in [self.seqs.keys[row]]
        ]

    def _keep(self, full: FullPages) -> None:
        """Let full pages be found, in all groups that have them."""
        for group in self.growing:
            self.pages.keep(group, self.seqs.tables[group][full.places], full.contents)

    def _new_entries(self, rows: np.ndarray, lengths: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows and table entries of the pages that rows need when they go on from `lengths` to `ends` tokens."""
        held = self.num_pages(lengths)
        new = self.num_pages(ends) - held
        (more,) = new.nonzero()
        return ragged(rows[more], held[more], new[more])

    def _tails(self, rows: np.ndarray) -> np.ndarray:
        """The page that the next token of each row goes into, `[growing groups, n]`; 0 where it begins a page."""
        entries = self.seqs.lengths[rows] // self.page_size
        return np.array([self.seqs.tables[group][rows, entries] for group in self.growing])

    def _shared_tails(self, rows: np.ndarray) -> list[tuple[int, int]]:
        """Groups and rows whose last page others have too, which is about to be written.

        Of the rows that share a page and all write it now, the last may have it, if nobody else does.
        """
        if not len(rows):
            return []
        tails = self._tails(rows)
        owners = self.pages.pool.owners(tails)
        shared, left = [], dict[int, int]()
        for group, at in np.argwhere(owners > 1).tolist():
            page = int(tails[group, at])
            left[page] = left.get(page, int(owners[group, at])) - 1
            if left[page]:
                shared.append((self.growing[group], int(rows[at])))
        return shared

    def _own_tails(self, rows: np.ndarray, shared: list[tuple[int, int]], copies: np.ndarray) -> None:
        """The last pages of these rows become theirs alone, those that are shared by copying; nobody finds them."""
        if not len(rows):
            return
        if shared:
            groups, shared_rows = np.array(shared).T
            self._copy_tails(groups, shared_rows, copies)
        tails = self._tails(rows)
        self.pages.forget(tails[self.pages.index.holds[tails]])
        self.seqs.owns_tail[rows] = True

    def _copy_tails(self, groups: np.ndarray, rows: np.ndarray, copies: np.ndarray) -> None:
        """These groups' and rows' last pages are copied, and the copies are theirs."""
        places = (groups, rows, self.seqs.lengths[rows] // self.page_size)
        shared = self.seqs.tables[places]
        self.pages.copy(shared, copies)
        self.seqs.tables[places] = copies
        self.pages.release(shared)


def ends_first(pages: Sequence[np.ndarray]) -> np.ndarray:
    """All groups' pages of a prefix, those at its end first: so they are to be released, and then evicted.

    Neither a page nor another group's is of use without the pages before it.

    >>> ends_first([np.array([1, 2, 3]), np.array([8, 9])])
    array([3, 9, 2, 8, 1])
    """
    behind = np.concatenate([np.arange(len(of_group))[::-1] for of_group in pages])
    return np.concatenate(pages)[np.argsort(behind, kind="stable")]
