"""Blocks of pages in decode: each has a few sub-blocks, which may belong to different sequences.

A sub-block is a run of at most `subblock_pages` pages of one sequence. The sub-blocks of a block are computed side by
side, so short sequences hide each other's latency. A long sequence has whole blocks to itself:

    sequence   | 0 | 1     | 2                                       |
    pages      |=- |===|== |===|===|===|===|===|===|===|-            |
    sub-block    0   1   2   3   4   5   6   7   8   9   10
    block      |       0       |       1       |       2       |

What each sub-block holds is noted in SMEM when its page ids are requested. The notes are read when the pages are
requested, and again when they are used.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paged_kernels._src.attention.tpu.config import Config, Memory
from paged_kernels._src.attention.tpu.copies import IDS_AHEAD, Cursor, PageBuffers, PageCopies
from paged_kernels._src.attention.tpu.schedule import Tiles
from paged_kernels._src.tpu.registers import LANES


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubBlock:
    """What a sub-block holds, as scalars."""

    tile: jax.Array
    page: jax.Array
    """Its first page, as an index in the sequence's page table."""
    count: jax.Array
    """The number of its pages; 0 for an empty sub-block."""


def notes_shape(c: Config):
    """Returns the SMEM to allocate for the notes of all blocks in flight.

    A block's notes are the number of its pages, then `tile`, `page` and `count` of each sub-block.
    """
    return pltpu.SMEM((_blocks_noted(c) * (1 + 3 * c.subblocks),), jnp.int32)


def _blocks_noted(c: Config) -> int:
    return c.buffers + IDS_AHEAD


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubBlockStream:
    """Blocks of sub-blocks in flight from HBM to VMEM. Blocks are numbered from 0."""

    config: Config
    tiles: Tiles
    page_table: Memory  # HBM [seqs, 1, ids_per_seq]
    copies: PageCopies
    buffers: PageBuffers
    notes: Memory  # SMEM, `notes_shape`

    def begin(self) -> Cursor:
        """Start the first `buffers - 1` blocks. Returns the cursor of the first block that has no sub-blocks yet."""
        at = Cursor(block=jnp.int32(0), tile=jnp.int32(0), page=self.tiles.first_page[0])
        for _ in range(IDS_AHEAD):
            at = self.assign(at)
        for block in range(self.config.buffers - 1):
            at = self.assign(at)
            self.wait_ids(block)
            self.start(block)
        return at

    def end(self, blocks) -> None:
        """Wait for page ids requested past the last block. `blocks` is the number of blocks."""
        for i in range(IDS_AHEAD):
            self.wait_ids(blocks + self.config.buffers - 1 + i)

    def assign(self, at: Cursor) -> Cursor:
        """Note the sub-blocks of the block at the cursor, and request their page ids.

        Returns the cursor of the next block. All sub-blocks of a block belong to one block of rows.
        """
        c, tiles, tile, page = self.config, self.tiles, at.tile, at.page
        end_tile, count = tiles.block_end[tile], 0
        for i in range(c.subblocks):
            left = jnp.where(tile < end_tile, tiles.end_page[tile] - page, 0)
            subblock = SubBlock(tile=tile, page=page, count=jnp.minimum(left, c.subblock_pages))
            self._note(at.block, i, subblock)
            self._ids_copy(at.block, i, subblock).start()
            count += subblock.count
            done = (left > 0) & (left <= c.subblock_pages)
            tile = tile + done.astype(jnp.int32)
            page = jnp.where(left > c.subblock_pages, page + c.subblock_pages, tiles.first_page[tile])
        self.notes[self._first_note(at.block)] = count
        return Cursor(block=at.block + 1, tile=tile, page=page)

    def subblock(self, block, i) -> SubBlock:
        """Returns what is noted of sub-block `i` of a block."""
        first = self._first_note(block) + 1 + 3 * i
        tile, page, count = (self.notes[first + field] for field in range(3))
        return SubBlock(tile=tile, page=page, count=count)

    def count(self, block) -> jax.Array:
        """The number of pages in a block."""
        return self.notes[self._first_note(block)]

    def is_whole(self, block) -> jax.Array:
        """True if the block has `kv_pages` pages."""
        return self.count(block) == self.config.kv_pages

    def wait_ids(self, block) -> None:
        """Wait until the page ids of a block have arrived."""
        for i in range(self.config.subblocks):
            self._ids_copy(block, i, self.subblock(block, i)).wait()

    def start(self, block) -> None:
        """Start the copies of a block, whose page ids have arrived."""
        jax.lax.fori_loop(0, self.config.subblocks, lambda i, _: self.start_subblock(block, i), None)

    def start_subblock(self, block, i, *, whole: bool = False) -> None:
        """Start `subblock_pages` copies for sub-block `i` of a block.

        Copies past its last page have zero bytes; `whole` says that there are none. Without a branch, the copies start
        side by side and share their address computations.
        """
        c, subblock = self.config, self.subblock(block, i)
        ids = self._first_id(block, i) + subblock.page % LANES
        target = self.copies.destination(self.buffer(block), i * c.subblock_pages, c.subblock_pages, subblock=i)
        for page in range(c.subblock_pages):
            self.copies.start(self.buffers.ids[ids + page], target, page, whole or page < subblock.count)

    def wait(self, block) -> None:
        """Wait until a block is in its buffer."""
        for i in range(self.config.subblocks):
            self.copies.wait(self.buffer(block), self.subblock(block, i).count, i)

    def wait_whole(self, block) -> None:
        """Wait for a whole block."""
        for i in range(self.config.subblocks):
            self.copies.wait(self.buffer(block), self.config.subblock_pages, i)

    def buffer(self, block) -> jax.Array:
        """The buffer of a block."""
        return block % self.config.buffers

    def _ids_copy(self, block, i, subblock: SubBlock):
        first = pl.multiple_of(subblock.page // LANES * LANES, LANES)
        source = self.page_table.at[self.tiles.seq[subblock.tile], 0, pl.ds(first, self.config.ids_per_copy)]
        target = self.buffers.ids.at[pl.ds(pl.multiple_of(self._first_id(block, i), LANES), self.config.ids_per_copy)]
        return pltpu.make_async_copy(source, target, self.buffers.ids_arrived.at[block % (IDS_AHEAD + 1)])

    def _first_id(self, block, i):
        return (block % (IDS_AHEAD + 1) * self.config.subblocks + i) * self.config.ids_per_copy

    def _note(self, block, i, subblock: SubBlock) -> None:
        first = self._first_note(block) + 1 + 3 * i
        for field, value in enumerate((subblock.tile, subblock.page, subblock.count)):
            self.notes[first + field] = value

    def _first_note(self, block):
        c = self.config
        return block % _blocks_noted(c) * (1 + 3 * c.subblocks)
