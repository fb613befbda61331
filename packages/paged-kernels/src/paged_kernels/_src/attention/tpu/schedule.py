"""Which query rows attend to which pages, as integers: the work of a batch, split into tiles.

Query rows are split into blocks of `q_rows`, counted from row 0. A *tile* is the part of one block that belongs to one
sequence:

    rows    | seq 0   | seq 1                           | seq 2 |
    blocks  |         0         |         1         |         2         |
    tiles   | tile 0  | tile 1  |      tile 2       | 3   | tile 4 |

A tile knows the pages that its rows can see. Only those are copied. All of this is plain XLA on small arrays, so the
kernel's loops take no decisions.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from paged_kernels._src.attention.mask import key_range
from paged_kernels._src.batch import RaggedBatch
from paged_kernels._src.spec import AttentionSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """The tiles of a batch, in row order.

    There is one entry more than there can be tiles. Unused entries are zero. Inside the kernel, the fields are
    references to scalar memory.
    """

    block_starts: Int32[Array, " q_blocks_plus_1"]
    """The first tile of each block of rows; the last entry is the number of tiles."""
    seq: Int32[Array, " tiles"]
    """The tile's sequence."""
    kv_len: Int32[Array, " tiles"]
    """The number of tokens of that sequence."""
    row_lo: Int32[Array, " tiles"]
    """The tile's first row, counted from the first row of its block."""
    row_hi: Int32[Array, " tiles"]
    """One past the tile's last row."""
    position: Int32[Array, " tiles"]
    """The position of the *block's* first row in the sequence: row `r` has position `position + r`."""
    first_page: Int32[Array, " tiles"]
    """The first page that a row of the tile sees, as an index in the sequence's page table."""
    end_page: Int32[Array, " tiles"]
    """One past the last such page. Always greater than `first_page`: rows that see no key have one page too."""
    block_end: Int32[Array, " tiles"]
    """One past the last tile of the tile's block."""
    first_new: Int32[Array, " tiles"]
    """The position of the sequence's first row, which is its first new token. Used with a tree mask."""


def max_tiles(tokens: int, seqs: int, q_rows: int) -> int:
    """The most tiles that a batch can have: each has a row, and starts a block or a sequence."""
    return min(tokens, -(-tokens // q_rows) + seqs)


def make_tiles(batch: RaggedBatch, spec: AttentionSpec, *, tokens: int, q_rows: int, page_size: int) -> Tiles:
    """Returns the tiles of a batch. Gaps, padding and rows before position 0 have none."""
    end = jnp.minimum(batch.cu_q_lens[1:], tokens)
    kv_lens = jnp.minimum(batch.kv_lens, batch.pages_per_seq * page_size)
    in_use = (jnp.arange(batch.max_seqs) < batch.num_seqs) & (kv_lens > 0)
    start, first_position = batch.cu_q_lens[:-1], batch.q_starts
    if first_position is None:
        first_position = kv_lens - (end - start)
        start = jnp.maximum(start, end - kv_lens)  # rows before position 0 are not tokens
    has_rows = in_use & (start < end)
    first_block = start // q_rows
    tiles_of_seq = jnp.where(has_rows, (end - 1) // q_rows + 1 - first_block, 0)
    tile_ends = jnp.cumsum(tiles_of_seq)

    tile = jnp.arange(max_tiles(tokens, batch.max_seqs, q_rows) + 1)
    seq = jnp.sum(tile_ends[None] <= tile[:, None], axis=1)
    valid = seq < batch.max_seqs
    seq = jnp.where(valid, seq, 0)
    block = first_block[seq] + tile - (tile_ends - tiles_of_seq)[seq]
    row_lo = jnp.maximum(start[seq] - block * q_rows, 0)
    row_hi = jnp.minimum(end[seq] - block * q_rows, q_rows)
    kv_len = kv_lens[seq]
    position = (first_position - batch.cu_q_lens[:-1])[seq] + block * q_rows
    has_tree = batch.tree_mask is not None
    first_key, end_key = key_range(spec, position + row_lo, position + row_hi, kv_len, tree=has_tree)
    first_page = jnp.minimum(first_key, kv_len - 1) // page_size

    q_blocks = -(-tokens // q_rows)
    block = jnp.where(valid, block, q_blocks)
    block_starts = jnp.sum(block[None] < jnp.arange(q_blocks + 1)[:, None], axis=1)

    def used(values):
        return jnp.where(valid, values, 0).astype(jnp.int32)

    return Tiles(
        block_starts=block_starts.astype(jnp.int32),
        seq=used(seq),
        kv_len=used(kv_len),
        row_lo=used(row_lo),
        row_hi=used(row_hi),
        position=used(position),
        first_page=used(first_page),
        end_page=used(jnp.maximum(-(-end_key // page_size), first_page + 1)),
        block_end=used(jnp.append(block_starts, 0)[block + 1]),
        first_new=used(first_position[seq]),
    )


def page_block_starts(tiles: Tiles, *, subblock_pages: int, subblocks: int) -> Int32[Array, " q_blocks_plus_1"]:
    """Returns the number of blocks of pages before each block of rows, then their total.

    A block of pages has `subblocks` sub-blocks of up to `subblock_pages` pages. Each sub-block belongs to one tile, and
    all sub-blocks of a block of pages belong to one block of rows.
    """
    subblocks_of_tile = -(-(tiles.end_page - tiles.first_page) // subblock_pages)
    before_tile = jnp.append(0, jnp.cumsum(subblocks_of_tile))
    subblocks_of_block = jnp.diff(before_tile[tiles.block_starts])
    return jnp.append(0, jnp.cumsum(-(-subblocks_of_block // subblocks))).astype(jnp.int32)
