"""Which tokens attend to which pages: one step's sequences, ragged, in arrays of fixed shape."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RaggedBatch:
    """The sequences of one step: whose rows are whose, how long each is, and where its pages are.

        rows    | seq 0 | seq 1          | gap | seq 3 |  padding  |     of q, k, v and the output
                0       cu[1]            cu[2] cu[3]   cu[num_seqs]

    Sequence `i` owns rows `cu_q_lens[i]:cu_q_lens[i+1]`. They are its newest tokens: row `j` of its `n` rows stands
    at position `kv_lens[i] - n + j`. Its key at position `p` lies in slot `p % page_size` of page
    `page_table[i, p // page_size]`. Decode has one row a sequence, prefill many; a batch may hold any mix.

    A sequence with `kv_lens[i] == 0` is a gap (an idle sequence, padding between sequences): its rows, like the rows
    past the last sequence, give zeros and write nothing, whatever q, k and v hold there. So does a row whose
    position would be negative.
    Page 0 is the null page: it fills unused table entries and is never read or written.
    """

    page_table: Int32[Array, "seqs pages_per_seq"]
    """The pages of each sequence in order; entries past its last page are ignored."""
    kv_lens: Int32[Array, " seqs"]
    """Tokens of each sequence, this step's included."""
    cu_q_lens: Int32[Array, " seqs_plus_1"]
    """Row at which each sequence's queries start, and after the last the end; does not decrease."""
    num_seqs: Int32[Array, ""]
    """How many of the `seqs` entries are in use; those after are ignored."""
    max_q_len: int | None = dataclasses.field(default=None, metadata={"static": True})
    """Static promise that no sequence has more rows than this; 1 lets a kernel specialise for decode."""
    tree_mask: Int32[Array, "tokens words"] | None = None
    """Which of its sequence's new tokens each row sees, in place of causality: bit `j % 32` of word `j // 32` for new
    token `j`, the key at the position of the sequence's first row plus `j` (`pack_tree_masks`). Older keys are not
    touched by it. Needs `max_q_len`, of at most `32 * words`."""
    q_starts: Int32[Array, " seqs"] | None = None
    """Position of each sequence's first row; `None` means that rows are the newest tokens, `kv_lens - rows`. For
    batches whose pages are a part of the context only, counted from that part's first key: the partial results are
    merged (`merge_attention_states`), and nothing can be written through such a batch. It may be negative: the part
    then lies after the rows."""

    def __post_init__(self) -> None:
        if self.max_q_len is not None and (not isinstance(self.max_q_len, int) or self.max_q_len < 1):
            raise ValueError(f"max_q_len={self.max_q_len!r} must be an int of at least 1, or None when it is not known")

    @property
    def max_seqs(self) -> int:
        """Number of sequence slots, used or not."""
        return self.page_table.shape[0]

    @property
    def first_positions(self) -> Int32[Array, " seqs"]:
        """Position of each sequence's first row."""
        if self.q_starts is not None:
            return self.q_starts
        return self.kv_lens - (self.cu_q_lens[1:] - self.cu_q_lens[:-1])

    @property
    def pages_per_seq(self) -> int:
        """Width of the page table."""
        return self.page_table.shape[1]

    @classmethod
    def from_lists(
        cls, page_lists: list[list[int]], kv_lens: list[int], q_lens: list[int], *, max_q_len: int | None = None
    ) -> "RaggedBatch":
        """A batch of exactly these sequences, its table as wide as the longest list of pages.

        >>> RaggedBatch.from_lists([[3, 1], [2]], kv_lens=[5, 2], q_lens=[1, 2]).page_table.tolist()
        [[3, 1], [2, 0]]

        Raises:
            ValueError: the lists differ in length.
        """
        if not len(page_lists) == len(kv_lens) == len(q_lens):
            raise ValueError(
                f"page_lists ({len(page_lists)}), kv_lens ({len(kv_lens)}) and q_lens ({len(q_lens)}) "
                "must have one entry for each sequence"
            )
        width = max([1, *map(len, page_lists)])
        page_table = np.zeros((max(1, len(page_lists)), width), np.int32)
        for row, pages in zip(page_table, page_lists, strict=False):
            row[: len(pages)] = pages
        lens = np.zeros(len(page_table), np.int32)
        lens[: len(kv_lens)] = kv_lens
        starts = np.zeros(len(page_table) + 1, np.int32)
        np.cumsum(q_lens, out=starts[1 : len(q_lens) + 1])
        return cls(
            page_table=jnp.asarray(page_table),
            kv_lens=jnp.asarray(lens),
            cu_q_lens=jnp.asarray(starts),
            num_seqs=jnp.int32(len(page_lists)),
            max_q_len=max_q_len,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenRows:
    """Where each row of a batch stands: derived from a `RaggedBatch`, one entry a row."""

    seq: Int32[Array, " tokens"]
    """The row's sequence; 0 for padding."""
    position: Int32[Array, " tokens"]
    """The row's position in its sequence; -1 for padding and gaps."""
    is_token: Bool[Array, " tokens"]
    """Whether the row is a token: no padding, no gap, and not before its sequence's beginning."""


def token_rows(batch: RaggedBatch, tokens: int) -> TokenRows:
    """The sequence and position of each of `tokens` rows."""
    row = jnp.arange(tokens, dtype=np.int32)
    ends = batch.cu_q_lens[1:]
    in_use = jnp.arange(batch.max_seqs) < batch.num_seqs
    # A row's sequence is the number of sequences in use that end at or before it.
    seq = jnp.sum((ends[None] <= row[:, None]) & in_use[None], axis=1, dtype=np.int32)
    is_padding = seq >= batch.num_seqs
    seq = jnp.where(is_padding, 0, seq)
    position = batch.first_positions[seq] + row - batch.cu_q_lens[seq]
    gap = is_padding | (batch.kv_lens[seq] == 0)
    begun = position >= 0 if batch.q_starts is None else True  # a part of the context may lie after a row
    return TokenRows(seq=seq, position=jnp.where(gap, -1, position), is_token=~gap & begun)


def pack_tree_masks(masks: Sequence[np.ndarray | None], q_lens: Sequence[int], *, tokens: int) -> np.ndarray:
    """The `RaggedBatch.tree_mask` of sequences with these masks, int32 `[tokens, words]`.

    `masks[i][r, j]` says whether row `r` of sequence `i` sees its new token `j`; `None` means causal.

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
            raise ValueError(f"masks[{seq}] {mask.shape} must be [{q_len}, {q_len}], a row and a column a new token")
        sees[row : row + q_len, :q_len] = mask != 0
        row += q_len
    return np.packbits(sees, axis=1, bitorder="little").view("<i4").astype(np.int32)
