"""The kernel's copies between HBM and the core: pages, page ids, query rows, output rows.

Blocks of pages stream through `buffers` slots of VMEM in the order in which they are attended, whatever tile they
belong to, so the next sequence's pages are on their way while this one's are attended:

    step          0        1        2        3
    page ids   0 1|      2 |      3 |      4 |            one step ahead of the pages
    pages      0 .|. 1 . .|. 2 . .|. 3 . .|               buffers - 1 steps ahead of use
    attend        |   0    |   1    |   2    |

Every slot has a semaphore of its own: a wait for one block cannot be satisfied by another's copies.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paged_kernels.attention.mask import key_range
from paged_kernels.attention.tpu.config import Config, Memory
from paged_kernels.attention.tpu.schedule import Tiles
from paged_kernels.mosaic import LANES

PAGES_AT_ONCE = 8
"""Copies of a full block that are started side by side."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cursor:
    """One block of pages in the order of attending."""

    step: jax.Array
    """How many blocks come before it."""
    tile: jax.Array
    """Its tile; the number of tiles when there is no such block."""
    page: jax.Array
    """Index in the sequence's page list of its first page."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PageBuffers:
    """Memory of the page copies."""

    kv: Memory  # [buffers, kv_heads, block_tokens, kv_lanes]
    kv_arrived: Memory  # semaphores [buffers]
    held: Memory  # SMEM [buffers], pages of each slot that need not be zero
    ids: Memory  # SMEM [2, table_chunks, 1, 128]
    ids_arrived: Memory  # semaphores [2]

    @classmethod
    def shapes(cls, c: Config) -> "PageBuffers":
        """What to allocate."""
        return cls(
            kv=pltpu.VMEM((c.buffers, c.kv_heads, c.block_tokens, c.kv_lanes), c.kv_dtype),
            kv_arrived=pltpu.SemaphoreType.DMA((c.buffers,)),
            held=pltpu.SMEM((c.buffers,), jnp.int32),
            ids=pltpu.SMEM((2, c.table_chunks, 1, LANES), jnp.int32),
            ids_arrived=pltpu.SemaphoreType.DMA((2,)),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PageStream:
    """Blocks of pages on their way from HBM into VMEM.

    A row of the block that is no token of its sequence is zero, so it may be multiplied by a weight of zero: whatever
    another sequence's values are, infinities and NaN too, they stay with that sequence.
    """

    config: Config
    tiles: Tiles
    table: Memory  # HBM [seqs, table_rows, 1, 128]
    pages: Memory  # HBM [pages, kv_heads, page_size, kv_lanes]
    buffers: PageBuffers

    def begin(self) -> tuple[Cursor, Cursor]:
        """Start the first `buffers - 1` blocks. The first block's cursor, and that of the first not yet started."""
        zero = jnp.int32(0)
        first = Cursor(step=zero, tile=zero, page=self.tiles.first_page[0])
        self._start_ids(first)
        for slot in range(self.config.buffers):
            self.buffers.held[slot] = jnp.int32(self.config.kv_pages)  # nobody knows what
        ahead = first
        for _ in range(self.config.buffers - 1):
            ahead = self.start(ahead)
        return first, ahead

    def start(self, at: Cursor) -> Cursor:
        """Start the copies of block `at`, and of the next block's page ids, where there are such; the next's cursor."""
        after = self.advance(at)

        @pl.when(at.tile < self._num_tiles())
        def _():
            self._ids_copy(at).wait()
            self._for_pages(at, lambda i, _: self._page_copy(at, i, self._page_id(at, i)).start())
            self._start_ids(after)

        return after

    def wait(self, at: Cursor) -> None:
        """Wait until block `at` is in its slot, and zero what is no token of its sequence."""
        full = self._count(at) == self.config.kv_pages

        @pl.when(full)
        def _():  # a semaphore counts bytes, so one wait serves all copies of the block
            slot = self.slot(at)
            buffer = self.buffers.kv.at[slot]
            pltpu.make_async_copy(buffer, buffer, self.buffers.kv_arrived.at[slot]).wait()

        @pl.when(jnp.logical_not(full))
        def _():
            jax.lax.fori_loop(0, self._count(at), lambda i, _: self._page_copy(at, i, 0).wait(), None)

        self._zero_other_pages(at)
        self._clean(at)

    def slot(self, at: Cursor) -> jax.Array:
        """The buffer that block `at` is in."""
        return at.step % self.config.buffers

    def advance(self, at: Cursor) -> Cursor:
        """The block after `at`."""
        page = at.page + self.config.kv_pages
        done = page >= self.tiles.end_page[at.tile]
        tile = jnp.minimum(at.tile + done.astype(jnp.int32), self._num_tiles())
        return Cursor(step=at.step + 1, tile=tile, page=jnp.where(done, self.tiles.first_page[tile], page))

    def _num_tiles(self) -> jax.Array:
        return self.tiles.block_starts[self.config.q_blocks]

    def _count(self, at: Cursor) -> jax.Array:
        return jnp.minimum(self.tiles.end_page[at.tile] - at.page, self.config.kv_pages)

    def _start_ids(self, at: Cursor) -> None:
        @pl.when(at.tile < self._num_tiles())
        def _():
            self._ids_copy(at).start()

    def _ids_copy(self, at: Cursor):
        rows = pl.ds(at.page // LANES, self.config.table_chunks)
        slot = at.step % 2
        source = self.table.at[self.tiles.seq[at.tile], rows]
        return pltpu.make_async_copy(source, self.buffers.ids.at[slot], self.buffers.ids_arrived.at[slot])

    def _for_pages(self, at: Cursor, body) -> None:
        """Run `body` for each page of the block; in a full block several at a time, to overlap their address sums."""
        full = self._count(at) == self.config.kv_pages

        @pl.when(full)
        def _():
            jax.lax.fori_loop(0, self.config.kv_pages, body, None, unroll=min(self.config.kv_pages, PAGES_AT_ONCE))

        @pl.when(jnp.logical_not(full))
        def _():
            jax.lax.fori_loop(0, self._count(at), body, None)

    def _page_id(self, at: Cursor, i):
        entry = at.page % LANES + i
        return self.buffers.ids[at.step % 2, entry // LANES, 0, entry % LANES]

    def _page_copy(self, at: Cursor, i, page_id):
        """The copy of a page to place `i` of the block. To wait for it any id will do: by then, `ids` holds others."""
        slot = self.slot(at)
        return pltpu.make_async_copy(
            self.pages.at[page_id], self.buffers.kv.at[slot, :, self._rows(i)], self.buffers.kv_arrived.at[slot]
        )

    def _rows(self, i):
        size = self.config.page_size
        return pl.ds(pl.multiple_of(i * size, size), size)

    def _zero_other_pages(self, at: Cursor) -> None:
        """Zero the pages that an earlier block left in the slot and this block does not fetch."""
        slot, count = self.slot(at), self._count(at)

        def zero_page(i, _):
            page = self.buffers.kv.at[slot, :, self._rows(i)]
            page[...] = jnp.zeros(page.shape, page.dtype)

        jax.lax.fori_loop(count, self.buffers.held[slot], zero_page, None)
        self.buffers.held[slot] = count

    def _clean(self, at: Cursor) -> None:
        tiles, size = self.tiles, self.config.page_size
        kv_len, position = tiles.kv_len[at.tile], tiles.position[at.tile]
        first_key = key_range(self.config.spec, position + tiles.row_lo[at.tile], position, kv_len)[0]
        last_page = kv_len // size  # where the sequence ends inside a page, that page
        ends_inside = (kv_len % size != 0) & (last_page >= at.page) & (last_page < at.page + self._count(at))

        @pl.when(ends_inside)
        def _():
            self._zero_slots(at, last_page - at.page, 0, kv_len - last_page * size)

        if self.config.spec.sliding_window is not None:

            @pl.when((first_key % size != 0) & (first_key // size == at.page))
            def _():
                self._zero_slots(at, 0, first_key % size, size)

    def _zero_slots(self, at: Cursor, i, lo, hi) -> None:
        """Keep only the slots `lo` up to `hi` (exclusive) of page `i` of the block."""
        page = self.buffers.kv.at[self.slot(at), :, self._rows(i)]
        rows = page[...].astype(jnp.float32)
        slot = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 1)
        page[...] = jnp.where((slot >= lo) & (slot < hi), rows, 0).astype(page.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RowBuffers:
    """Memory of the copies of query, output and log-sum-exp rows; two slots each."""

    q: Memory  # [2, kv_heads, rows, lanes]
    out: Memory  # [2, kv_heads, rows, lanes]
    lse: Memory  # [2, lse_rows / 128, 128]
    arrived: Memory  # semaphores [2], of q
    left: Memory  # semaphores [2, 2], of out and lse

    @classmethod
    def shapes(cls, c: Config) -> "RowBuffers":
        """What to allocate."""
        rows = (2, c.kv_heads, c.rows, c.lanes)
        return cls(
            q=pltpu.VMEM(rows, c.compute_dtype),
            out=pltpu.VMEM(rows, c.q_dtype),
            lse=pltpu.VMEM((2, c.lse_rows // LANES, LANES), jnp.float32),
            arrived=pltpu.SemaphoreType.DMA((2,)),
            left=pltpu.SemaphoreType.DMA((2, 2)),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowStream:
    """Blocks of query rows on their way in, of output rows on their way out; block `b` uses slot `b % 2`."""

    config: Config
    q: Memory  # HBM [q_blocks, kv_heads, rows, lanes]
    out: Memory  # HBM [q_blocks, kv_heads, rows, lanes]
    lse: Memory  # HBM [q_blocks, lse_rows / 128, 128]
    buffers: RowBuffers

    def start_q(self, block) -> None:
        """Start the copy of a block of query rows, if there is one."""

        @pl.when(block < self.config.q_blocks)
        def _():
            self._q_copy(block).start()

    def wait_q(self, block) -> None:
        """Wait until a block of query rows is in its slot."""
        self._q_copy(block).wait()

    def start_out(self, block) -> None:
        """Start the copy of a finished block."""
        for copy in self._out_copies(block):
            copy.start()

    def wait_out(self, block) -> None:
        """Wait until a block has left its slot, if there is one."""

        @pl.when(block >= 0)
        def _():
            for copy in self._out_copies(block):
                copy.wait()

    def _q_copy(self, block):
        slot = block % 2
        return pltpu.make_async_copy(self.q.at[block], self.buffers.q.at[slot], self.buffers.arrived.at[slot])

    def _out_copies(self, block):
        slot, b = block % 2, self.buffers
        return (
            pltpu.make_async_copy(b.out.at[slot], self.out.at[block], b.left.at[slot, 0]),
            pltpu.make_async_copy(b.lse.at[slot], self.lse.at[block], b.left.at[slot, 1]),
        )
