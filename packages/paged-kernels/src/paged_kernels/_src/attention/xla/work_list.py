"""The work list: which rows are attended together, and which keys they need. Integers alone."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from paged_kernels._src.attention.mask import key_range
from paged_kernels._src.batch import RaggedBatch
from paged_kernels._src.spec import AttentionSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkList:
    """Rows of one sequence that are attended together, and the keys that they see; one entry a tile.

    keys of the sequence | . . . . | k k k k | k k k k | k k . . |     page_size 4, page 0 outside the window
                                   ^ first_page = 1        ^ kv_end = 14
    """

    seq: Int32[Array, "*tiles"]
    """The sequence."""
    first_row: Int32[Array, "*tiles"]
    """Row of q at which the tile starts."""
    num_rows: Int32[Array, "*tiles"]
    """How many rows of q are the tile's; it may be less than a full tile."""
    position: Int32[Array, "*tiles"]
    """Position of the first row in its sequence."""
    first_page: Int32[Array, "*tiles"]
    """Index in the page table of the first page with a key that some row sees."""
    kv_end: Int32[Array, "*tiles"]
    """Position after the last key that some row sees."""

    def __getitem__(self, index: Int32[Array, ""]) -> "WorkList":
        """One tile."""
        return jax.tree.map(lambda field: field[index], self)

    def end_page(self, page_size: int) -> Int32[Array, "*tiles"]:
        """Index in the page table after the last page with a key that some row sees."""
        return -(-self.kv_end // page_size)

    def num_blocks(self, page_size: int, kv_pages: int) -> Int32[Array, "*tiles"]:
        """How many blocks of `kv_pages` pages the tile walks."""
        return jnp.maximum(0, -((self.first_page - self.end_page(page_size)) // kv_pages))


def make_work_list(
    batch: RaggedBatch, spec: AttentionSpec, *, tokens: int, page_size: int, q_rows: int, single_rows: bool
) -> tuple[WorkList, Int32[Array, ""]]:
    """The tiles of at most `q_rows` rows, and how many there are; entries past that number mean nothing.

    Args:
        batch: the sequences; gaps, and slots that are not in use, have no tiles.
        spec: decides which keys a row sees.
        tokens: rows of q.
        page_size: tokens a page holds.
        q_rows: rows of a full tile.
        single_rows: list the sequences that have a single row; otherwise list the others.
    """
    q_lens = batch.cu_q_lens[1:] - batch.cu_q_lens[:-1]
    slots = jnp.arange(batch.max_seqs, dtype=jnp.int32)
    listed = (slots < batch.num_seqs) & (batch.kv_lens > 0) & ((q_lens == 1) == single_rows)
    ends = jnp.cumsum(jnp.where(listed, -(-q_lens // q_rows), 0), dtype=jnp.int32)

    most = min(tokens, batch.max_seqs if single_rows else tokens // q_rows + batch.max_seqs)
    tile = jnp.arange(most, dtype=jnp.int32)
    seq = jnp.searchsorted(ends, tile, side="right", method="compare_all").astype(jnp.int32)
    seq = jnp.minimum(seq, batch.max_seqs - 1)
    rows_before = (tile - jnp.where(seq > 0, ends[seq - 1], 0)) * q_rows  # of the sequence, in earlier tiles
    num_rows = jnp.minimum(q_rows, q_lens[seq] - rows_before)
    position = batch.first_positions[seq] + rows_before
    kv_len = jnp.minimum(batch.kv_lens[seq], batch.pages_per_seq * page_size)
    first_key, kv_end = key_range(spec, position, position + num_rows, kv_len, tree=batch.tree_mask is not None)
    tiles = WorkList(
        seq=seq,
        first_row=batch.cu_q_lens[seq] + rows_before,
        num_rows=num_rows,
        position=position,
        first_page=first_key // page_size,
        kv_end=kv_end,
    )
    return tiles, ends[-1]
