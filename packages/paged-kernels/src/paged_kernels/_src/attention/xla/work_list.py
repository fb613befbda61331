"""The work list: which rows are attended together, and which keys they need. Only integers."""

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
    """Tiles: rows of one sequence that are attended together, and the keys that they see. One entry per tile.

    keys of the sequence | . . . . | k k k k | k k k k | k k . . |     page_size 4, page 0 outside the window
                                   ^ first_page = 1        ^ kv_end = 14
    """

    seq: Int32[Array, "*tiles"]
    """The tile's sequence."""
    first_row: Int32[Array, "*tiles"]
    """The row of q at which the tile starts."""
    num_rows: Int32[Array, "*tiles"]
    """The number of rows of q in the tile. It may be less than in a full tile."""
    position: Int32[Array, "*tiles"]
    """The position of the first row in its sequence."""
    first_page: Int32[Array, "*tiles"]
    """The first page with a key that some row sees, as an index in the page table."""
    kv_end: Int32[Array, "*tiles"]
    """One past the position of the last key that some row sees."""

    def __getitem__(self, index: Int32[Array, ""]) -> "WorkList":
        """Returns one tile."""
        return jax.tree.map(lambda field: field[index], self)

    def end_page(self, page_size: int) -> Int32[Array, "*tiles"]:
        """One past the last page with a key that some row sees, as an index in the page table."""
        return -(-self.kv_end // page_size)

    def num_blocks(self, page_size: int, kv_pages: int) -> Int32[Array, "*tiles"]:
        """The number of blocks of `kv_pages` pages in the tile."""
        return jnp.maximum(0, -((self.first_page - self.end_page(page_size)) // kv_pages))


def make_work_list(
    batch: RaggedBatch, spec: AttentionSpec, *, tokens: int, page_size: int, q_rows: int, single_rows: bool
) -> tuple[WorkList, Int32[Array, ""]]:
    """Returns the tiles of at most `q_rows` rows, and their number. Entries past that number are meaningless.

    There are never more tiles than `tokens` rows can have, whatever traced values say: the walk loops over them.

    Args:
        batch: the sequences. Gaps and unused entries have no tiles.
        spec: decides which keys a row sees.
        tokens: rows of q.
        page_size: tokens per page.
        q_rows: rows of a full tile.
        single_rows: True lists the sequences with exactly one row, False lists the others.
    """
    starts = jnp.clip(batch.cu_q_lens, 0, tokens)
    q_lens = jnp.maximum(starts[1:] - starts[:-1], 0)
    index = jnp.arange(batch.max_seqs, dtype=jnp.int32)
    listed = (index < batch.num_seqs) & (batch.kv_lens > 0) & ((q_lens == 1) == single_rows)
    ends = jnp.cumsum(jnp.where(listed, -(-q_lens // q_rows), 0), dtype=jnp.int32)

    most = min(tokens, batch.max_seqs if single_rows else tokens // q_rows + batch.max_seqs)
    tile = jnp.arange(most, dtype=jnp.int32)
    seq = jnp.searchsorted(ends, tile, side="right", method="compare_all").astype(jnp.int32)
    seq = jnp.minimum(seq, batch.max_seqs - 1)
    rows_before = (tile - jnp.where(seq > 0, ends[seq - 1], 0)) * q_rows  # rows of this sequence in earlier tiles
    num_rows = jnp.minimum(q_rows, q_lens[seq] - rows_before)
    position = batch.first_positions[seq] + rows_before
    kv_len = jnp.minimum(batch.kv_lens[seq], batch.pages_per_seq * page_size)
    first_key, kv_end = key_range(spec, position, position + num_rows, kv_len, tree=batch.tree_mask is not None)
    tiles = WorkList(
        seq=seq,
        first_row=starts[seq] + rows_before,
        num_rows=num_rows,
        position=position,
        first_page=first_key // page_size,
        kv_end=kv_end,
    )
    return tiles, jnp.minimum(ends[-1], most)
