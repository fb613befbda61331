"""The state of all sequences, as numpy arrays: a step of many sequences takes a few numpy calls."""

import struct

import numpy as np
from numpy.typing import ArrayLike

from paged_cache._src.manager.arrays import first_true, most
from paged_cache._src.manager.cache_hit import Admission
from paged_cache._src.manager.prefix import Content, Media, hash_page, media_bytes
from paged_cache._src.manager.prompt import TOKEN_DTYPE, check_tokens

UNKNOWN = -1
"""Stands for a token id that is not known yet."""
_UNKNOWN_BYTES = np.array(UNKNOWN, TOKEN_DTYPE).tobytes()


class Sequences:
    """A struct of arrays with one entry per sequence. A sequence's id gives its index: `index = seq % max_seqs`.

        tokens of a sequence | computed: keys and values in pages | to be computed | no slot yet
                             0                                    computed         length

        page_tables[g, index] | 0 .. 0 | page ids | 0 .. 0 |
                              0        first_page ceil(length / page_size)

    The arrays have room for `max_seqs` sequences of full length. The operating system gives memory only to the parts
    that are used.
    """

    def __init__(self, max_seqs: int, max_sequence_length: int, page_size: int, num_groups: int) -> None:
        """Create arrays without sequences.

        Raises:
            ValueError: a size is below 1.
        """
        max_seqs = check_integer("max_seqs", max_seqs, 1)
        self.max_sequence_length = check_integer("max_sequence_length", max_sequence_length, 1)
        self.page_size = check_integer("page_size", page_size, 1)
        pages_per_seq = -(-self.max_sequence_length // self.page_size)
        self.page_tables = np.zeros((num_groups, max_seqs, pages_per_seq), np.int32)
        """Page ids; 0, the null page, where a sequence has no page."""
        self.first_page = np.zeros((num_groups, max_seqs), np.int32)
        """`[groups, max_seqs]`: number of the first page that the sequence still has. Windows release those before."""
        self.lengths = np.zeros(max_seqs, np.int32)
        """Tokens that have a slot."""
        self.computed = np.zeros(max_seqs, np.int32)
        """Tokens whose keys and values are in pages."""
        self.cross_tokens = np.zeros(max_seqs, np.int32)
        """Tokens that cross-attention sees."""
        self.token_ids = np.zeros((max_seqs, pages_per_seq * self.page_size), TOKEN_DTYPE)
        self.num_full_pages = np.zeros(max_seqs, np.int32)
        """Full pages already considered for hashing."""
        self.has_private_tail = np.zeros(max_seqs, bool)
        """True if the last page is known to be private and not indexed. False means unknown."""
        self.hashes: list[list[bytes]] = [[] for _ in range(max_seqs)]
        """The root hash, then the hash of each full page, up to the first page with an unknown token."""
        self.media: list[tuple[Media, ...]] = [() for _ in range(max_seqs)]
        self.host_pages: dict[int, np.ndarray] = {}
        """Host pages of the sequences that are swapped out, by index; one group after another."""
        self._ids = np.full(max_seqs, -1, np.int64)
        self._ones = np.ones(max_seqs, np.int64)
        self._last_lookup: tuple[tuple[np.dtype, tuple[int, ...], bytes], np.ndarray] | None = None
        self._next_ids = np.arange(max_seqs, dtype=np.int64)
        self._free_indices = list(range(max_seqs - 1, -1, -1))

    @property
    def max_seqs(self) -> int:
        """The most sequences at once."""
        return len(self._ids)

    @property
    def num_seqs(self) -> int:
        """The number of sequences."""
        return self.max_seqs - len(self._free_indices)

    def all_on_device(self) -> np.ndarray:
        """The indices of all sequences that are not swapped out."""
        indices = np.flatnonzero(self._ids >= 0)
        return indices[~np.isin(indices, list(self.host_pages))]

    def indices_on_device(self, seqs: ArrayLike) -> np.ndarray:
        """The indices of these sequences, none of which may be swapped out.

        Raises:
            ValueError: a sequence does not exist, is named twice, or is swapped out.
        """
        indices = self.indices(seqs)
        if self.host_pages and (swapped := self.host_pages.keys() & indices.tolist()):
            raise ValueError(f"sequence {self._ids[min(swapped)]} is swapped out; call swap_in first")
        return indices

    def index_on_device(self, seq: int) -> int:
        """The index of one sequence, which must not be swapped out.

        Raises:
            ValueError: it does not exist, is swapped out, or `seq` is not one id.
        """
        return _single(self.indices_on_device(seq), seq)

    def index(self, seq: int) -> int:
        """The index of one sequence, swapped out or not.

        Raises:
            ValueError: it does not exist, or `seq` is not one id.
        """
        return _single(self.indices(seq), seq)

    def indices(self, seqs: ArrayLike) -> np.ndarray:
        """The indices of these sequences, swapped out or not.

        A step asks for the same sequences several times, so the last result is remembered. It is dropped when a
        sequence is added or removed.

        Raises:
            ValueError: a sequence does not exist, or is named twice.
        """
        ids = np.asarray(seqs)
        query = ids.dtype, ids.shape, ids.tobytes()
        if self._last_lookup is None or self._last_lookup[0] != query:
            if ids.ndim > 1 or (ids.size and ids.dtype.kind not in "iu"):
                raise ValueError(f"seqs={seqs!r} must be one sequence id or a list of them")
            self._last_lookup = query, self._find_indices(ids.astype(np.int64).reshape(-1))
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
        """Check that `n` more sequences fit.

        Raises:
            ValueError: there would be more than `max_seqs` sequences.
        """
        if n > len(self._free_indices):
            raise ValueError(
                f"{n} more sequences are too many beside {self.num_seqs} of max_seqs={self.max_seqs}; release some, or "
                "raise max_seqs"
            )

    def check_lengths(self, lengths: ArrayLike) -> None:
        """Check that sequences of these lengths fit.

        Raises:
            ValueError: a length is above `max_sequence_length`.
        """
        longest = most(np.asarray(lengths).reshape(-1), if_none=0)
        if longest > self.max_sequence_length:
            raise ValueError(
                f"a sequence of {longest} tokens is longer than max_sequence_length="
                f"{self.max_sequence_length}; end it, or raise max_sequence_length"
            )

    def check_counts(self, counts: ArrayLike, n: int, name: str = "counts") -> np.ndarray:
        """Return one positive count for each of `n` sequences; a single number counts for all.

        Raises:
            ValueError: the number of counts is wrong, or a count is below 1 or not an int32.
        """
        if type(counts) is int and counts == 1:  # a decode step
            return self._ones[:n]
        array = np.asarray(counts)
        if array.shape not in ((), (n,)) or (array.size and array.dtype.kind not in "iu"):
            raise ValueError(f"{name}={counts!r} must be a whole number, or one for each of {n} sequences")
        if array.size and not 1 <= array.min() <= array.max() < 2**31:
            wrong = array.min() if array.min() < 1 else array.max()
            raise ValueError(f"{name} holds {wrong}; each must lie in 1 .. 2**31 - 1; leave out sequences without any")
        return np.full(n, array, np.int64)

    def computed_after(self, indices: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Tokens of each sequence that are computed after `counts` more.

        Raises:
            ValueError: a sequence has fewer tokens left to compute.
        """
        computed, lengths = self.computed[indices] + counts, self.lengths[indices]
        if (at := first_true(computed > lengths)) is not None:
            left = lengths[at] - self.computed[indices[at]]
            raise ValueError(f"counts[{at}]={counts[at]} is more than the {left} tokens left; extend before it")
        return computed

    def check_all_computed(self, index: int, doing: str) -> None:
        """Check that all tokens of a sequence are computed.

        Raises:
            ValueError: some tokens are left to compute.
        """
        left = self.lengths[index] - self.computed[index]
        if left:
            raise ValueError(
                f"{left} tokens of the sequence are not computed, so it cannot be {doing}; commit or truncate"
            )

    def set_token_ids(self, places: tuple[np.ndarray, np.ndarray], token_ids: ArrayLike) -> np.ndarray:
        """Set the token ids at these `(indices, positions)`. Returns the ids that were there before.

        Raises:
            ValueError: a different id is already known for a position.
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
        """Add a sequence without pages, and return its index and id. The caller has called `check_room`."""
        index, seq = self._new_index()
        self.lengths[index] = new.length
        self.computed[index] = new.hit.num_tokens
        self.cross_tokens[index] = new.cross_tokens
        self.token_ids[index, : new.length] = new.prompt.token_ids[: new.length]
        self.num_full_pages[index] = new.hit.num_pages
        self.has_private_tail[index] = True  # all pages after the shared full ones are new
        self.hashes[index] = new.prompt.prefix_hashes(new.hit.num_pages, self.page_size)
        self.media[index] = new.prompt.media
        return index, seq

    def add_fork(self, index: int) -> int:
        """Add a copy of a sequence, with the same pages, and return its id. The caller has called `check_room`."""
        twin, seq = self._new_index()
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
        """Shorten a sequence to its first `length` tokens. The caller releases the pages."""
        num_full = length // self.page_size
        self.lengths[index] = length
        self.computed[index] = min(self.computed[index], length)
        self.num_full_pages[index] = min(self.num_full_pages[index], num_full)
        self.has_private_tail[index] = False
        del self.hashes[index][num_full + 1 :]

    def remove(self, index: int) -> None:
        """Remove a sequence. The caller has released its pages."""
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
        pages = struct.unpack(f"{size}s" * (len(data) // size), data)  # the fastest way to split bytes
        if _UNKNOWN_BYTES in data:  # only from unknown tokens: the last byte of a known id is below 128
            return [b"" if _UNKNOWN_BYTES in page else page for page in pages]
        return list(pages)

    def hash_pages(self, places: tuple[np.ndarray, np.ndarray]) -> list[Content]:
        """Hash full pages, and return their contents. `places` are the pages' `(indices, page numbers)`, in order.

        A page with an unknown token gets no hash, and neither do the later pages of its sequence.
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
        """Drop the hashes of all sequences, so that their present and future pages are not indexed."""
        for hashes in self.hashes:
            hashes.clear()

    def page_media(self, index: int, page: int) -> bytes:
        """The `media_bytes` of a page, by its number."""
        media = self.media[index]
        return media_bytes(media, page * self.page_size, (page + 1) * self.page_size) if media else b""

    def _new_index(self) -> tuple[int, int]:
        self._last_lookup = None
        index = self._free_indices.pop()
        seq = int(self._next_ids[index])
        self._next_ids[index] += self.max_seqs  # no id is used twice
        self._ids[index] = seq
        return index, seq


def _single(indices: np.ndarray, seq: int) -> int:
    if len(indices) != 1:
        raise ValueError(f"seq={seq!r} must be one sequence id")
    return int(indices[0])


def check_integer(name: str, value: int, least: int) -> int:
    """Return `value` as a Python int of at least `least`: unsigned numpy integers cannot be negated.

    Raises:
        ValueError: it is not a whole number, or below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")
    return int(value)
