"""All sequences as a struct of arrays, so that a step of many sequences is a few numpy calls."""

import struct

import numpy as np
from numpy.typing import ArrayLike

from paged_cache._src.manager.arrays import first_true, most
from paged_cache._src.manager.prefix import Content, Media, media_bytes, page_key
from paged_cache._src.manager.prompt import TOKEN_DTYPE, check_tokens
from paged_cache._src.manager.reuse import Admission

UNKNOWN = -1
"""In place of a token id that is not known yet."""
_UNKNOWN_BYTES = np.array(UNKNOWN, TOKEN_DTYPE).tobytes()


class Sequences:
    """The rows of a table, one for each sequence there can be; a sequence's id names its row and its turn in it.

        tokens of a sequence | computed: keys and values in pages | to be computed | not known to the manager
                             0                                    computed         length

    Arrays are reserved whole and touched where sequences are: longer ones cost address space, not memory.
    """

    def __init__(self, max_seqs: int, max_sequence_length: int, page_size: int, num_groups: int) -> None:
        """No sequences.

        Raises:
            ValueError: a size is below 1.
        """
        max_seqs = check_whole("max_seqs", max_seqs, 1)
        self.max_sequence_length = check_whole("max_sequence_length", max_sequence_length, 1)
        self.page_size = check_whole("page_size", page_size, 1)
        pages_per_seq = -(-self.max_sequence_length // self.page_size)
        self.tables = np.zeros((num_groups, max_seqs, pages_per_seq), np.int32)
        self.first = np.zeros((num_groups, max_seqs), np.int32)
        """Index of the first table entry that is a page."""
        self.lengths = np.zeros(max_seqs, np.int32)
        self.computed = np.zeros(max_seqs, np.int32)
        self.cross_tokens = np.zeros(max_seqs, np.int32)
        self.token_ids = np.zeros((max_seqs, pages_per_seq * self.page_size), TOKEN_DTYPE)
        self.num_full = np.zeros(max_seqs, np.int32)
        """How many pages of a row were full, so that they could have a key, when it last was looked at."""
        self.owns_tail = np.zeros(max_seqs, bool)
        """Whether the page that the next token goes into, if it begins none, is the row's alone and nobody can find it;
        where this is false, it is not known."""
        self.keys: list[list[bytes]] = [[] for _ in range(max_seqs)]
        """The root, then the key of each full page up to the first with a token that is not known."""
        self.media: list[tuple[Media, ...]] = [() for _ in range(max_seqs)]
        self.host_pages: dict[int, np.ndarray] = {}
        """Of the rows that are swapped out: their host pages, one group's after another's."""
        self._ids = np.full(max_seqs, -1, np.int64)
        self._ones = np.ones(max_seqs, np.int64)
        self._asked: tuple[tuple[np.dtype, tuple[int, ...], bytes], np.ndarray] | None = None
        self._next_ids = np.arange(max_seqs, dtype=np.int64)
        self._free_rows = list(range(max_seqs - 1, -1, -1))

    @property
    def max_seqs(self) -> int:
        """How many there can be at once."""
        return len(self._ids)

    @property
    def num_seqs(self) -> int:
        """How many there are."""
        return self.max_seqs - len(self._free_rows)

    def rows_with_pages(self) -> np.ndarray:
        """Rows of all sequences that are not swapped out."""
        rows = np.flatnonzero(self._ids >= 0)
        return rows[~np.isin(rows, list(self.host_pages))]

    def rows(self, seqs: ArrayLike) -> np.ndarray:
        """The rows of some sequences that have their pages.

        Raises:
            ValueError: one does not exist, is named twice, or is swapped out.
        """
        rows = self.rows_of_any(seqs)
        if self.host_pages and (swapped := self.host_pages.keys() & rows.tolist()):
            raise ValueError(f"sequence {self._ids[min(swapped)]} is swapped out; call swap_in first")
        return rows

    def row(self, seq: int) -> int:
        """The row of one sequence that has its pages.

        Raises:
            ValueError: it does not exist or is swapped out, or there are several.
        """
        return _only(self.rows(seq), seq)

    def row_of_any(self, seq: int) -> int:
        """The row of one sequence, be it swapped out or not.

        Raises:
            ValueError: it does not exist, or there are several.
        """
        return _only(self.rows_of_any(seq), seq)

    def rows_of_any(self, seqs: ArrayLike) -> np.ndarray:
        """The rows of some sequences, be they swapped out or not.

        A step names the same sequences in several calls, so the last answer is kept until a sequence comes or goes.

        Raises:
            ValueError: one does not exist, or is named twice.
        """
        ids = np.asarray(seqs)
        asked = ids.dtype, ids.shape, ids.tobytes()
        if self._asked is None or self._asked[0] != asked:
            if ids.ndim > 1 or (ids.size and ids.dtype.kind not in "iu"):
                raise ValueError(f"seqs={seqs!r} must be one sequence id or a list of them")
            self._asked = asked, self._rows_of(ids.astype(np.int64).reshape(-1))
        return self._asked[1]

    def _rows_of(self, ids: np.ndarray) -> np.ndarray:
        rows = ids % self.max_seqs
        missing = (self._ids[rows] != ids) | (ids < 0)
        if missing.any():
            raise ValueError(f"sequence {ids[missing.argmax()]} does not exist; was it released?")
        if len(rows) > 1 and (times := np.bincount(rows)).max() > 1:
            raise ValueError(f"sequence {self._ids[times.argmax()]} is named {times.max()} times; name each once")
        rows.flags.writeable = False
        return rows

    def check_room(self, n: int) -> None:
        """Refuse `n` more sequences.

        Raises:
            ValueError: there would be more than `max_seqs`.
        """
        if n > len(self._free_rows):
            raise ValueError(
                f"{n} more sequences are too many beside {self.num_seqs} of max_seqs={self.max_seqs}; release some, or "
                "raise max_seqs"
            )

    def check_lengths(self, lengths: ArrayLike) -> None:
        """Refuse sequences that are too long.

        Raises:
            ValueError: there would be more than `max_sequence_length` tokens.
        """
        longest = most(np.asarray(lengths).reshape(-1), if_none=0)
        if longest > self.max_sequence_length:
            raise ValueError(
                f"a sequence of {longest} tokens is longer than max_sequence_length="
                f"{self.max_sequence_length}; end it, or raise max_sequence_length"
            )

    def check_counts(self, counts: ArrayLike, n: int) -> np.ndarray:
        """One whole number of at least 1 for each of `n` sequences.

        Raises:
            ValueError: there is another number of counts, or one is below 1 or beyond int32.
        """
        if type(counts) is int and counts == 1:  # a decode step
            return self._ones[:n]
        array = np.asarray(counts)
        if array.shape not in ((), (n,)) or (array.size and array.dtype.kind not in "iu"):
            raise ValueError(f"counts={counts!r} must be a whole number, or one for each of {n} sequences")
        if array.size and not 1 <= array.min() <= array.max() < 2**31:
            wrong = array.min() if array.min() < 1 else array.max()
            raise ValueError(f"counts holds {wrong}; each must lie in 1 .. 2**31 - 1; leave out sequences without any")
        return np.full(n, array, np.int64)

    def check_left(self, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """How many tokens of each row are computed when `counts` more are.

        Raises:
            ValueError: a row has fewer that have a slot.
        """
        computed, lengths = self.computed[rows] + counts, self.lengths[rows]
        if (at := first_true(computed > lengths)) is not None:
            left = lengths[at] - self.computed[rows[at]]
            raise ValueError(f"counts[{at}]={counts[at]} is more than the {left} tokens left; extend before it")
        return computed

    def check_all_computed(self, row: int, doing: str) -> None:
        """Refuse what needs all tokens in pages.

        Raises:
            ValueError: some are left to compute.
        """
        left = self.lengths[row] - self.computed[row]
        if left:
            raise ValueError(
                f"{left} tokens of the sequence are not computed, so it cannot be {doing}; commit or truncate"
            )

    def learn(self, places: tuple[np.ndarray, np.ndarray], token_ids: ArrayLike) -> np.ndarray:
        """These are the tokens at these places, which were not known, or are the same; returns what was known.

        Raises:
            ValueError: another token is there.
        """
        known = self.token_ids[places]
        tokens = check_tokens(token_ids, len(known))
        if (at := first_true((known != UNKNOWN) & (known != tokens))) is not None:
            raise ValueError(
                f"token_ids[{at}]={tokens[at]}, but extend was told {known[at]}; truncate, and extend anew"
            )
        self.token_ids[places] = tokens
        return known

    def add(self, new: Admission) -> tuple[int, int]:
        """The row and the id of a new sequence, which has no pages yet; there is room for it."""
        row, seq = self._take_row()
        self.lengths[row] = new.length
        self.computed[row] = new.reuse.num_tokens
        self.cross_tokens[row] = new.cross_tokens
        self.token_ids[row, : new.length] = new.prompt.token_ids[: new.length]
        self.num_full[row] = new.reuse.num_pages
        self.owns_tail[row] = True  # all pages after the full ones that were found are new
        self.keys[row] = new.prompt.keys(new.reuse.num_pages, self.page_size)
        self.media[row] = new.prompt.media
        return row, seq

    def add_like(self, row: int) -> int:
        """The id of a new sequence with all that this one has; there is room for it."""
        twin, seq = self._take_row()
        length = self.lengths[row]
        num_pages = -(-int(max(length, self.cross_tokens[row])) // self.page_size)
        self.tables[:, twin, :num_pages] = self.tables[:, row, :num_pages]
        self.first[:, twin] = self.first[:, row]
        for array in (self.lengths, self.computed, self.cross_tokens, self.num_full):
            array[twin] = array[row]
        self.owns_tail[[row, twin]] = False
        self.token_ids[twin, :length] = self.token_ids[row, :length]
        self.keys[twin] = self.keys[row].copy()
        self.media[twin] = self.media[row]
        return seq

    def cut(self, row: int, length: int) -> None:
        """The sequence has only its first `length` tokens."""
        num_full = length // self.page_size
        self.lengths[row] = length
        self.computed[row] = min(self.computed[row], length)
        self.num_full[row] = min(self.num_full[row], num_full)
        self.owns_tail[row] = False
        del self.keys[row][num_full + 1 :]

    def remove(self, row: int) -> None:
        """The sequence is no more; its pages have been taken out of the tables."""
        self.first[:, row] = 0
        for array in (self.lengths, self.computed, self.cross_tokens, self.num_full):
            array[row] = 0
        self.keys[row], self.media[row] = [], ()
        self.host_pages.pop(row, None)
        self._ids[row] = -1
        self._free_rows.append(row)
        self._asked = None

    def page_tokens(self, places: tuple[np.ndarray, np.ndarray]) -> list[bytes]:
        """The tokens of full pages, at these rows and table entries, as they are hashed; none where one is unknown."""
        data = self.token_ids.reshape(self.max_seqs, -1, self.page_size)[places].tobytes()
        size = TOKEN_DTYPE.itemsize * self.page_size
        pages = struct.unpack(f"{size}s" * (len(data) // size), data)  # the fastest way to cut it up
        if _UNKNOWN_BYTES in data:  # nowhere else, since the last byte of an id that is known is below 128
            return [b"" if _UNKNOWN_BYTES in page else page for page in pages]
        return list(pages)

    def name(self, places: tuple[np.ndarray, np.ndarray]) -> list[Content]:
        """What the pages at these rows and table entries hold, which have become full, and what they are found by.

        A page with a token that is not known has no key, nor have those after it in its row.
        """
        contents, last, key = [], -1, b""
        for row, page, token_ids in zip(places[0].tolist(), places[1].tolist(), self.page_tokens(places), strict=True):
            if row != last:
                keys = self.keys[row]
                last, key = row, keys[-1] if len(keys) == page + 1 else b""
            parent, media = key, self.page_media(row, page) if self.media[row] else b""
            key = page_key(parent, token_ids, media) if parent and token_ids else b""
            contents.append((key, parent, token_ids, media))
        return contents

    def forget_keys(self) -> None:
        """No sequence of now has a key, so nobody can find what it has and will compute."""
        for keys in self.keys:
            keys.clear()

    def page_media(self, row: int, page: int) -> bytes:
        """What media add to the key of a page."""
        media = self.media[row]
        return media_bytes(media, page * self.page_size, (page + 1) * self.page_size) if media else b""

    def _take_row(self) -> tuple[int, int]:
        self._asked = None
        row = self._free_rows.pop()
        seq = int(self._next_ids[row])
        self._next_ids[row] += self.max_seqs  # so no id comes twice
        self._ids[row] = seq
        return row, seq


def _only(rows: np.ndarray, seq: int) -> int:
    if len(rows) != 1:
        raise ValueError(f"seq={seq!r} must be one sequence id")
    return int(rows[0])


def check_whole(name: str, value: int, least: int) -> int:
    """A whole number of at least `least`, as Python's: numpy's unsigned ones cannot be negated.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")
    return int(value)
