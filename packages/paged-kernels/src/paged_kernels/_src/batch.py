"""Which tokens attend to which pages: the sequences of one step, in arrays of fixed shape."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RaggedBatch:
    """The sequences of one step: their rows, their lengths and their pages.

        rows    | seq 0 | seq 1          | gap | seq 3 |  padding  |     of q, k, v and the output
                0       cu[1]            cu[2] cu[3]   cu[num_seqs]

    Sequence `i` has rows `cu_q_lens[i]:cu_q_lens[i+1]`. They are its newest tokens: row `j` of its `n` rows has
    position `kv_lens[i] - n + j`. Its key at position `p` is in slot `p % page_size` of page `page_table[i, p //
    page_size]`. In decode each sequence has one row, in prefill many; a batch may mix both.

    A sequence with `kv_lens[i] == 0` is a gap: an idle sequence, or padding between sequences. Rows of gaps, rows past
    the last sequence, and rows before position 0 are not tokens. They give zeros and write nothing, whatever q, k and v
    hold there. Page 0 is the null page: it fills unused entries of the page table, and is never read or written.
    """

    page_table: Int32[Array, "seqs pages_per_seq"]
    """The pages of each sequence in order; entries past its last page are ignored."""
    kv_lens: Int32[Array, " seqs"]
    """The number of tokens of each sequence, including those of this step."""
    cu_q_lens: Int32[Array, " seqs_plus_1"]
    """The first row of each sequence; the last entry is the end. Never decreases."""
    num_seqs: Int32[Array, ""]
    """How many of the `seqs` sequences are in use; later ones are ignored."""
    max_q_len: int | None = dataclasses.field(default=None, metadata={"static": True})
    """A static promise that no sequence has more rows than this. With 1, a kernel is compiled for decode."""
    tree_mask: Int32[Array, "tokens words"] | None = None
    """Which new tokens of its sequence each row sees, instead of causality (see `pack_tree_masks`).

    Bit `j % 32` of word `j // 32` stands for new token `j`: the key `j` positions after the sequence's first row. Older
    keys are not affected. Needs `max_q_len`, of at most `32 * words`.
    """
    q_starts: Int32[Array, " seqs"] | None = None
    """The position of each sequence's first row. `None` means `kv_lens - q_lens`: rows are the newest tokens.

    For batches whose pages hold only a part of the context. Positions then count from the first key of that part, and
    may be negative if the part lies after the rows. The partial results are merged by `merge_attention_states`. Such a
    batch cannot be written.
    """

    def __post_init__(self) -> None:
        if self.max_q_len is not None and (not isinstance(self.max_q_len, int) or self.max_q_len < 1):
            raise ValueError(f"max_q_len={self.max_q_len!r} must be an int of at least 1, or None when it is not known")

    @property
    def max_seqs(self) -> int:
        """The most sequences in the batch, in use or not."""
        return self.page_table.shape[0]

    @property
    def first_positions(self) -> Int32[Array, " seqs"]:
        """The position of each sequence's first row."""
        if self.q_starts is not None:
            return self.q_starts
        return self.kv_lens - (self.cu_q_lens[1:] - self.cu_q_lens[:-1])

    @property
    def pages_per_seq(self) -> int:
        """The width of the page table."""
        return self.page_table.shape[1]

    @classmethod
    def from_lists(
        cls, page_lists: list[list[int]], kv_lens: list[int], q_lens: list[int], *, max_q_len: int | None = None
    ) -> "RaggedBatch":
        """Returns a batch of exactly these sequences. The page table is as wide as the longest list of pages.

        >>> RaggedBatch.from_lists([[3, 1], [2]], kv_lens=[5, 2], q_lens=[1, 2]).page_table.tolist()
        [[3, 1], [2, 0]]

        Raises:
            ValueError: the lists differ in length, or an entry is not a whole number that an int32 holds.
        """
        if not len(page_lists) == len(kv_lens) == len(q_lens):
            raise ValueError(
                f"page_lists ({len(page_lists)}), kv_lens ({len(kv_lens)}) and q_lens ({len(q_lens)}) "
                "must have one entry for each sequence"
            )
        width = max([1, *map(len, page_lists)])
        page_table = np.zeros((max(1, len(page_lists)), width), np.int32)
        for page_ids, pages in zip(page_table, page_lists, strict=False):
            page_ids[: len(pages)] = _int32("page_lists", pages)
        lens = np.zeros(len(page_table), np.int32)
        lens[: len(kv_lens)] = _int32("kv_lens", kv_lens)
        starts = np.zeros(len(page_table) + 1, np.int32)
        ends = np.cumsum(_int32("q_lens", q_lens), dtype=np.int64)
        starts[1 : len(q_lens) + 1] = _int32("the sum of q_lens", ends)
        return cls(
            page_table=jnp.asarray(page_table),
            kv_lens=jnp.asarray(lens),
            cu_q_lens=jnp.asarray(starts),
            num_seqs=jnp.int32(len(page_lists)),
            max_q_len=max_q_len,
        )


def _int32(name: str, numbers: Sequence[int] | np.ndarray) -> Int32[np.ndarray, " n"]:
    """Returns these numbers as int32.

    Raises:
        ValueError: one of them is not a whole number that an int32 holds.
    """
    array = np.asarray(numbers) if len(numbers) else np.empty(0, np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{name} has {numbers!r}, which must be a list of whole numbers")
    wrong = (array < -(2**31)) | (array >= 2**31)
    if wrong.any():
        raise ValueError(f"{name} has {array[wrong.argmax()]}, which must be a whole number below 2**31, as int32")
    return array.astype(np.int32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenRows:
    """The sequence and position of each row of a batch; one entry per row."""

    seq: Int32[Array, " tokens"]
    """The row's sequence; 0 for padding."""
    position: Int32[Array, " tokens"]
    """The row's position in its sequence; -1 for padding and gaps."""
    is_token: Bool[Array, " tokens"]
    """True if the row is a token: not padding, not in a gap, and not before position 0."""


def token_rows(batch: RaggedBatch, tokens: int) -> TokenRows:
    """Returns the sequence and position of each of `tokens` rows."""
    row = jnp.arange(tokens, dtype=np.int32)
    ends = batch.cu_q_lens[1:]
    in_use = jnp.arange(batch.max_seqs, dtype=np.int32) < batch.num_seqs
    # A row's sequence is the number of sequences in use that end at or before it.
    seq = jnp.sum((ends[None] <= row[:, None]) & in_use[None], axis=1, dtype=np.int32)
    is_padding = seq >= batch.num_seqs
    seq = jnp.where(is_padding, 0, seq)
    position = batch.first_positions[seq] + row - batch.cu_q_lens[seq]
    gap = is_padding | (batch.kv_lens[seq] == 0)
    # With `q_starts`, a part of the context may lie after a row: then a negative position is valid.
    begun = position >= 0 if batch.q_starts is None else True
    return TokenRows(seq=seq, position=jnp.where(gap, -1, position), is_token=~gap & begun)


def pack_tree_masks(masks: Sequence[np.ndarray | None], q_lens: Sequence[int], *, tokens: int) -> np.ndarray:
    """Returns the `RaggedBatch.tree_mask` of sequences with these masks, int32 `[tokens, words]`.

    `masks[i][r, j]` is true if row `r` of sequence `i` sees its new token `j`. A mask of `None` means causal.

    >>> pack_tree_masks([np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]]), None], [3, 2], tokens=6).tolist()
    [[1], [3], [5], [1], [3], [0]]

    Raises:
        ValueError: a mask is not `[q_len, q_len]`, or there are more rows than `tokens`.
    """
    if sum(q_lens) > tokens:
        raise ValueError(f"q_lens sum to {sum(q_lens)}, more than the {tokens} tokens")
    words = max(1, -(-max(q_lens, default=1) // 32))
    sees = np.zeros((tokens, 32 * words), np.uint8)
    row = 0
    for seq, (given, q_len) in enumerate(zip(masks, q_lens, strict=True)):
        mask = np.tri(q_len) if given is None else np.asarray(given)
        if mask.shape != (q_len, q_len):
            raise ValueError(
                f"masks[{seq}] {mask.shape} must be [{q_len}, {q_len}]: one row and one column per new token"
            )
        sees[row : row + q_len, :q_len] = mask != 0
        row += q_len
    return np.packbits(sees, axis=1, bitorder="little").view("<i4").astype(np.int32)
