"""All sequences as a struct of arrays, so that a step of many sequences is a few numpy calls."""

import struct

import numpy as np
from numpy.typing import ArrayLike

from paged_cache._src.manager.arrays import first_true, most
from paged_cache._src.manager.cache_hit import Admission
from paged_cache._src.manager.prefix import Content, Media, hash_page, media_bytes
from paged_cache._src.manager.prompt import TOKEN_DTYPE, check_tokens

UNKNOWN = -1
"""In place of a token id that is not known yet."""
_UNKNOWN_BYTES = np.array(UNKNOWN, TOKEN_DTYPE).tobytes()


class Sequences:
    """The indices of a table, one for each sequence there can be; a sequence's id names its index and its turn in it.

        tokens of a sequence | computed: keys and values in pages | to be computed | not known to the manager
                             0                                    computed         length

    Arrays are reserved whole and touched where sequences are: longer ones cost address space, not memory.
    """

    def __init__(self, max_seqs: int, max_sequence_length: int, page_size: int, num_groups: int) -> None:
        """No sequences.

        Raises:
            ValueError: a size is below 1.
        """
        max_seqs = check_integer("max_seqs", max_seqs, 1)
        self.max_sequence_length = check_integer("max_sequence_length", max_sequence_length, 1)
        self.page_size = check_integer("page_size", page_size, 1)
        pages_per_seq = -(-self.max_sequence_length // self.page_size)
        self.page_tables = np.zeros((num_groups, max_seqs, pages_per_seq), np.int32)
        self.first_page = np.zeros((num_groups, max_seqs), np.int32)
        """Index of the first table entry that is a page."""
        self.lengths = np.zeros(max_seqs, np.int32)
        self.computed = np.zeros(max_seqs, np.int32)
        self.cross_tokens = np.zeros(max_seqs, np.int32)
        self.token_ids = np.zeros((max_seqs, pages_per_seq * self.page_size), TOKEN_DTYPE)
        self.num_full_pages = np.zeros(max_seqs, np.int32)
        """How many pages of a index were full, so that they could have a key, when it last was looked at."""
        self.has_private_tail = np.zeros(max_seqs, bool)
        """True if the last page is known to be private and not indexed. False means unknown."""
        self.hashes: list[list[bytes]] = [[] for _ in range(max_seqs)]
        """The root, then the key of each full page up to the first with a token that is not known."""
        self.media: list[tuple[Media, ...]] = [() for _ in range(max_seqs)]
        self.host_pages: dict[int, np.ndarray] = {}
        """Of the indices that are swapped out: their host pages, one group's after another's."""
        self._ids = np.full(max_seqs, -1, np.int64)
        self._ones = np.ones(max_seqs, np.int64)
        self._last_lookup: tuple[tuple[np.dtype, tuple[int, ...], bytes], np.ndarray] | None = None
        self._next_ids = np.arange(max_seqs, dtype=np.int64)
        self._free_indices = list(range(max_seqs - 1, -1, -1))

    @property
    def max_seqs(self) -> int:
        """How many there can be at once."""
        return len(self._ids)

    @property
    def num_seqs(self) -> int:
        """How many there are."""
        return self.max_seqs - len(self._free_indices)

    def all_on_device(self) -> np.ndarray:
        """Rows of all sequences that are not swapped out."""
        indices = np.flatnonzero(self._ids >= 0)
        return indices[~np.isin(indices, list(self.host_pages))]

    def indices_on_device(self, seqs: ArrayLike) -> np.ndarray:
        """The indices of some sequences that have their pages.

        Raises:
            ValueError: one does not exist, is named twice, or is swapped out.
        """
        indices = self.indices(seqs)
        if self.host_pages and (swapped := self.host_pages.keys() & indices.tolist()):
            raise ValueError(f"sequence {self._ids[min(swapped)]} is swapped out; call swap_in first")
        return indices

    def index_on_device(self, seq: int) -> int:
        """The index of one sequence that has its pages.

        Raises:
            ValueError: it does not exist or is swapped out, or there are several.
        """
        return _only(self.indices_on_device(seq), seq)

    def index(self, seq: int) -> int:
        """The index of one sequence, be it swapped out or not.

        Raises:
            ValueError: it does not exist, or there are several.
        """
        return _only(self.indices(seq), seq)

    def indices(self, seqs: ArrayLike) -> np.ndarray:
        """The indices of some sequences, be they swapped out or not.

        A step names the same sequences in several calls, so the last answer is kept until a sequence comes or goes.

        Raises:
            ValueError: one does not exist, or is named twice.
        """
        ids = np.asarray(seqs)
        asked = ids.dtype, ids.shape, ids.tobytes()
        if self._last_lookup is None or self._last_lookup[0] != asked:
            if ids.ndim > 1 or (ids.size and ids.dtype.kind not in "iu"):
                raise ValueError(f"seqs={seqs!r} must be one sequence id or a list of them")
            self._last_lookup = asked, self._find_indices(ids.astype(np.int64).reshape(-1))
        return self._last_lookup[1]

    def _find_indices(self, ids: np.ndarray) -> np.ndarray:
        indices = ids % self.max_seqs
        missing = (self._ids[indices] != ids) | (ids < 0)
        if missing.any():
            raise ValueError(f"sequence {ids[missing.argmax()]} does not exist; was it released?")
        if len(indices) > 1 and (times := np.bincount(indices)).max() > 1:
            raise ValueError(f"sequence {self._ids[times.argmax()]} is named {times.max()} times; name each once")
        indices.flags.writeable = False
        return indices

    def check_room(self, n: int) -> None:
        """Refuse `n` more sequences.

        Raises:
            ValueError: there would be more than `max_seqs`.
        """
        if n > len(self._free_indices):
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

    def computed_after(self, indices: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """How many tokens of each index are computed when `counts` more are.

        Raises:
            ValueError: a index has fewer that have a slot.
        """
        computed, lengths = self.computed[indices] + counts, self.lengths[indices]
        if (at := first_true(computed > lengths)) is not None:
            left = lengths[at] - self.computed[indices[at]]
            raise ValueError(f"counts[{at}]={counts[at]} is more than the {left} tokens left; extend before it")
        return computed

    def check_all_computed(self, index: int, doing: str) -> None:
        """Refuse what needs all tokens in pages.

        Raises:
            ValueError: some are left to compute.
        """
        left = self.lengths[index] - self.computed[index]
        if left:
            raise ValueError(
                f"{left} tokens of the sequence are not computed, so it cannot be {doing}; commit or truncate"
            )

    def set_token_ids(self, places: tuple[np.ndarray, np.ndarray], token_ids: ArrayLike) -> np.ndarray:
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
        """The index and the id of a new sequence, which has no pages yet; there is room for it."""
        index, seq = self._take_index()
        self.lengths[index] = new.length
        self.computed[index] = new.hit.num_tokens
        self.cross_tokens[index] = new.cross_tokens
        self.token_ids[index, : new.length] = new.prompt.token_ids[: new.length]
        self.num_full_pages[index] = new.hit.num_pages
        self.has_private_tail[index] = True  # all pages after the full ones that were found are new
        self.hashes[index] = new.prompt.prefix_hashes(new.hit.num_pages, self.page_size)
        self.media[index] = new.prompt.media
        return index, seq

    def add_fork(self, index: int) -> int:
        """The id of a new sequence with all that this one has; there is room for it."""
        twin, seq = self._take_index()
        length = self.lengths[index]
        num_pages = -(-int(max(length, self.cross_tokens[index])) // self.page_size)
        self.page_tables[:, twin, :num_pages] = self.page_tables[:, index, :num_pages]
        self.first_page[:, twin] = self.first_page[:, index]
        for array in (self.lengths, self.computed, self.cross_tokens, self.num_full_pages):
            array[twin] = array[index]
        self.has_private_tail[[index, twin]] = False
        self.token_ids[twin, :length] = self.token_ids[index, :length]
        self.hashes[twin] = self.hashes[index].copy()
        self.media[twin] = self.media[index]
        return seq

    def truncate(self, index: int, length: int) -> None:
        """The sequence has only its first `length` tokens."""
        num_full = length // self.page_size
        self.lengths[index] = length
        self.computed[index] = min(self.computed[index], length)
        self.num_full_pages[index] = min(self.num_full_pages[index], num_full)
        self.has_private_tail[index] = False
        del self.hashes[index][num_full + 1 :]

    def remove(self, index: int) -> None:
        """The sequence is no more; its pages have been taken out of the tables."""
        self.first_page[:, index] = 0
        for array in (self.lengths, self.computed, self.cross_tokens, self.num_full_pages):
            array[index] = 0
        self.hashes[index], self.media[index] = [], ()
        self.host_pages.pop(index, None)
        self._ids[index] = -1
        self._free_indices.append(index)
        self._last_lookup = None

    def page_token_bytes(self, places: tuple[np.ndarray, np.ndarray]) -> list[bytes]:
        """The tokens of these full pages as bytes; empty for a page with an unknown token."""
        data = self.token_ids.reshape(self.max_seqs, -1, self.page_size)[places].tobytes()
        size = TOKEN_DTYPE.itemsize * self.page_size
        pages = struct.unpack(f"{size}s" * (len(data) // size), data)  # the fastest way to cut it up
        if _UNKNOWN_BYTES in data:  # nowhere else, since the last byte of an id that is known is below 128
            return [b"" if _UNKNOWN_BYTES in page else page for page in pages]
        return list(pages)

    def hash_pages(self, places: tuple[np.ndarray, np.ndarray]) -> list[Content]:
        """What the pages at these indices and table entries hold, which have become full, and what they are found by.

        A page with a token that is not known has no key, nor have those after it in its index.
        """
        contents, last, page_hash = [], -1, b""
        for index, page, token_ids in zip(
            places[0].tolist(), places[1].tolist(), self.page_token_bytes(places), strict=True
        ):
            if index != last:
                hashes = self.hashes[index]
                last, page_hash = index, hashes[-1] if len(hashes) == page + 1 else b""
            parent_hash, media = page_hash, self.page_media(index, page) if self.media[index] else b""
            page_hash = hash_page(parent_hash, token_ids, media) if parent_hash and token_ids else b""
            contents.append((page_hash, parent_hash, token_ids, media))
        return contents

    def clear_hashes(self) -> None:
        """No sequence of now has a key, so nobody can find what it has and will compute."""
        for hashes in self.hashes:
            hashes.clear()

    def page_media(self, index: int, page: int) -> bytes:
        """What media add to the key of a page."""
        media = self.media[index]
        return media_bytes(media, page * self.page_size, (page + 1) * self.page_size) if media else b""

    def _take_index(self) -> tuple[int, int]:
        self._last_lookup = None
        index = self._free_indices.pop()
        seq = int(self._next_ids[index])
        self._next_ids[index] += self.max_seqs  # so no id comes twice
        self._ids[index] = seq
        return index, seq


def _only(indices: np.ndarray, seq: int) -> int:
    if len(indices) != 1:
        raise ValueError(f"seq={seq!r} must be one sequence id")
    return int(indices[0])


def check_integer(name: str, value: int, least: int) -> int:
    """A whole number of at least `least`, as Python's: numpy's unsigned ones cannot be negated.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")
    return int(value)
