"""The kernel's copies between HBM and the core: pages, page ids, query rows, output rows.

Blocks of pages stream through `buffers` buffers of VMEM in the order in which they are attended, whatever tile they
belong to, so the next sequence's pages are on their way while this one's are attended:

    step          0        1        2        3            with 4 buffers
    page ids  |5 . . . |6 . . . |7 . . . |8 . . .         IDS_AHEAD steps ahead of the pages
    pages     |3 . . . |4 . . . |5 . . . |6 . . .         buffers - 1 steps ahead of use
    attend    |   0    |   1    |   2    |   3

Every buffer has semaphores of its own, in decode one for each sub-block: a wait for one block cannot be satisfied by
another's copies.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paged_kernels._src.attention.tpu.config import Config, Memory
from paged_kernels._src.attention.tpu.schedule import Tiles
from paged_kernels._src.tpu.registers import LANES

PAGES_AT_ONCE = 128
"""Copies of a whole block that are started side by side, to overlap their address sums."""

IDS_AHEAD = 2
"""Blocks whose page ids are on their way when a block's copies are started. They queue behind the copies of pages."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cursor:
    """One block of pages in the order of attending."""

    block: jax.Array
    """How many blocks come before it."""
    tile: jax.Array
    """Its tile; the number of tiles when there is no such block."""
    page: jax.Array
    """Index in the sequence's page list of its first page."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PageBuffers:
    """Memory of the page copies."""

    kv: Memory  # [buffers, kv_heads, kv_pages, page_size, storage_lanes]
    kv_arrived: Memory  # semaphores [buffers, sub-blocks in decode, else 1]
    scales: Memory  # [buffers, pages_held, kv_heads, scale_lanes], or None
    scales_arrived: Memory  # semaphores [as many], or None
    ids: Memory  # SMEM [(IDS_AHEAD + 1) * sub-blocks * ids]
    ids_arrived: Memory  # semaphores [IDS_AHEAD + 1]

    @classmethod
    def shapes(cls, c: Config) -> "PageBuffers":
        """What to allocate."""
        quantised, subblocks = c.layout.is_quantised, c.subblocks if c.decode else 1
        return cls(
            kv=pltpu.VMEM(
                (c.buffers, c.kv_heads, c.kv_pages, c.page_size, c.layout.storage_lanes), c.layout.storage_dtype
            ),
            kv_arrived=pltpu.SemaphoreType.DMA((c.buffers, subblocks)),
            scales=pltpu.VMEM((c.buffers, *c.scales_shape), jnp.float32) if quantised else None,
            scales_arrived=pltpu.SemaphoreType.DMA((c.buffers, subblocks)) if quantised else None,
            ids=pltpu.SMEM(((IDS_AHEAD + 1) * subblocks * c.ids_per_copy,), jnp.int32),
            ids_arrived=pltpu.SemaphoreType.DMA((IDS_AHEAD + 1,)),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Destination:
    """Where the copies of some pages go, and the semaphores that count them."""

    kv: Memory  # [kv_heads, pages, page_size, storage_lanes]
    kv_arrived: Memory
    scales: Memory = None  # [pages, kv_heads, scale_lanes], or None
    scales_arrived: Memory = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PageCopies:
    """The copies of single pages, and of their scales if they have any, into the buffers of `PageBuffers`."""

    config: Config
    data: Memory  # HBM [pages, kv_heads, page_size, storage_lanes]
    scales: Memory  # HBM [pages, kv_heads, 1, scale_lanes], or None
    buffers: PageBuffers

    def destination(self, buffer, first, count: int, subblock=0) -> "Destination":
        """Some target of a buffer from its place `first` on; known together, they share the sums of their addresses.

        `subblock` is that whose semaphore counts what arrives there.
        """
        b, arrived = self.buffers, (buffer, subblock)
        kv = b.kv.at[buffer, :, pl.ds(first, count)]
        if self.scales is None:
            return Destination(kv=kv, kv_arrived=b.kv_arrived.at[arrived])
        scales = b.scales.at[buffer, pl.ds(first, count)]
        return Destination(
            kv=kv, kv_arrived=b.kv_arrived.at[arrived], scales=scales, scales_arrived=b.scales_arrived.at[arrived]
        )

    def start(self, page_id, target: "Destination", i: int, exists: jax.Array | bool = True) -> None:
        """Start the copy of a page to one of some target; one of nothing, if there is no such page."""
        heads = pl.ds(0, self.config.kv_heads if exists is True else jnp.where(exists, self.config.kv_heads, 0))
        copies = [(self.data.at[page_id, heads], target.kv.at[heads, i], target.kv_arrived)]
        if target.scales is not None:
            copies.append((self.scales.at[page_id, heads, 0], target.scales.at[i, heads], target.scales_arrived))
        for source, place, arrived in copies:
            pltpu.make_async_copy(source, place, arrived).start()

    def wait(self, buffer, count, subblock=0) -> None:
        """Wait for `count` pages that a semaphore counts: it counts bytes, so one wait serves them."""
        b, arrived = self.buffers, (buffer, subblock)
        waits = [(b.kv.at[buffer, :, pl.ds(0, count)], b.kv_arrived.at[arrived])]
        if self.scales is not None:
            waits.append((b.scales.at[buffer, pl.ds(0, count)], b.scales_arrived.at[arrived]))
        for pages, arrived in waits:
            pltpu.make_async_copy(pages, pages, arrived).wait()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PageStream:
    """Blocks of pages on their way from HBM into VMEM.

    Of a block, only the pages that its tile sees are copied; what the buffer holds in the place of others is anything.
    """

    config: Config
    tiles: Tiles
    page_table: Memory  # HBM [seqs, 1, table_ids]
    copies: PageCopies
    buffers: PageBuffers

    def begin(self) -> tuple[Cursor, Cursor]:
        """Start the first `buffers - 1` blocks. The first block's cursor, and that of the first not yet started."""
        zero = jnp.int32(0)
        first = Cursor(block=zero, tile=zero, page=self.tiles.first_page[0])
        at = first
        for _ in range(IDS_AHEAD):
            self._start_ids(at)
            at = self.advance(at)
        at = first
        for _ in range(self.config.buffers - 1):
            self.start(at)
            at = self.advance(at)
        return first, at

    def start(self, at: Cursor) -> None:
        """Start the copies of block `at`, and of a later block's page ids, where there are such."""

        @pl.when(self.count(at) > 0)
        def _():
            self.prepare(at)

            @pl.when(self.is_whole(at))
            def _():
                self.start_whole(at)

            @pl.when(jnp.logical_not(self.is_whole(at)))
            def _():
                jax.lax.fori_loop(0, self.count(at), lambda i, _: self._start_page(at, i), None)

    def prepare(self, at: Cursor) -> None:
        """Wait for the page ids of block `at`, and start the copy of a later block's."""
        self._ids_copy(at).wait()
        for _ in range(IDS_AHEAD):
            at = self.advance(at)
        self._start_ids(at)

    def start_whole(self, at: Cursor) -> None:
        """Start the copies of a whole block, its ids being there."""
        pages = self.config.kv_pages
        jax.lax.fori_loop(0, pages, lambda i, _: self._start_page(at, i), None, unroll=min(pages, PAGES_AT_ONCE))

    def wait(self, at: Cursor) -> None:
        """Wait until block `at` is in its buffer."""

        @pl.when(self.is_whole(at))
        def _():
            self.wait_whole(at)

        @pl.when(jnp.logical_not(self.is_whole(at)))
        def _():
            jax.lax.fori_loop(0, self.count(at), lambda i, _: self.copies.wait(self.buffer(at), 1), None)

    def wait_whole(self, at: Cursor) -> None:
        """Wait for a whole block: a semaphore counts bytes, so one wait serves all copies."""
        self.copies.wait(self.buffer(at), self.config.kv_pages)

    def buffer(self, at: Cursor) -> jax.Array:
        """The buffer that block `at` is in."""
        return at.block % self.config.buffers

    def advance(self, at: Cursor) -> Cursor:
        """The block after `at`."""
        page = at.page + self.config.kv_pages
        done = page >= self.tiles.end_page[at.tile]
        tile = jnp.minimum(at.tile + done.astype(jnp.int32), self._num_tiles())
        return Cursor(block=at.block + 1, tile=tile, page=jnp.where(done, self.tiles.first_page[tile], page))

    def count(self, at: Cursor) -> jax.Array:
        """Pages of the block; 0 where there is no such block."""
        return jnp.minimum(self.tiles.end_page[at.tile] - at.page, self.config.kv_pages)

    def is_whole(self, at: Cursor) -> jax.Array:
        """Whether the block has as many pages as a block can have."""
        return self.count(at) == self.config.kv_pages

    def _num_tiles(self) -> jax.Array:
        return self.tiles.block_starts[self.config.q_blocks]

    def _start_ids(self, at: Cursor) -> None:
        @pl.when(self.count(at) > 0)
        def _():
            self._ids_copy(at).start()

    def _ids_copy(self, at: Cursor):
        buffer = at.block % (IDS_AHEAD + 1)
        first = pl.multiple_of(at.page // LANES * LANES, LANES)
        source = self.page_table.at[self.tiles.seq[at.tile], 0, pl.ds(first, self.config.ids_per_copy)]
        target = self.buffers.ids.at[
            pl.ds(pl.multiple_of(buffer * self.config.ids_per_copy, LANES), self.config.ids_per_copy)
        ]
        return pltpu.make_async_copy(source, target, self.buffers.ids_arrived.at[buffer])

    def _start_page(self, at: Cursor, i) -> None:
        page_id = self.buffers.ids[at.block % (IDS_AHEAD + 1) * self.config.ids_per_copy + at.page % LANES + i]
        self.copies.start(page_id, self.copies.destination(self.buffer(at), i, 1), 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RowBuffers:
    """Memory of the copies of query, output and log-sum-exp rows; two buffers each.

    In decode `q`, `tree` and `out` have one operand more than is copied, for sub-blocks of no sequence.
    """

    q: Memory  # [2 * operands, parts, rows, q_lanes]
    tree: Memory  # [2 * operands, operand_tokens, tree_lanes], or None
    out: Memory  # [2 * operands, parts, rows, out_lanes]
    lse: Memory  # [2, lse_rows / 128, 128], or None
    arrived: Memory  # semaphores [2, 2], of q and tree
    left: Memory  # semaphores [2, 2], of out and lse

    @classmethod
    def shapes(cls, c: Config) -> "RowBuffers":
        """What to allocate."""
        operands = 2 * c.operands + c.decode
        rows = (operands, c.parts, c.part_rows)
        return cls(
            q=pltpu.VMEM((*rows, c.q_lanes), c.compute_dtype),
            tree=pltpu.VMEM((operands, c.operand_tokens, c.tree_lanes), jnp.int32) if c.tree_words else None,
            out=pltpu.VMEM((*rows, c.out_lanes), c.q_dtype),
            lse=pltpu.VMEM((2, c.lse_rows // LANES, LANES), jnp.float32) if c.has_lse else None,
            arrived=pltpu.SemaphoreType.DMA((2, 2)),
            left=pltpu.SemaphoreType.DMA((2, 2)),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowStream:
    """Blocks of query rows on their way in, of output rows on their way out; block `b` uses buffer `b % 2`."""

    config: Config
    q: Memory  # HBM [q_blocks * operands, parts, rows, q_lanes]
    tree: Memory  # HBM [q_blocks * operands, operand_tokens, tree_lanes], or None
    out: Memory  # HBM [q_blocks * operands, parts, rows, out_lanes]
    lse: Memory  # HBM [q_blocks, lse_rows / 128, 128], or None
    buffers: RowBuffers

    def start_q(self, block) -> None:
        """Start the copy of a block of query rows, if there is one."""

        @pl.when(block < self.config.q_blocks)
        def _():
            for copy in self._q_copies(block):
                copy.start()

    def wait_q(self, block) -> None:
        """Wait until a block of query rows is in its buffer."""
        for copy in self._q_copies(block):
            copy.wait()

    def start_out(self, block) -> None:
        """Start the copy of a finished block."""
        for copy in self._out_copies(block):
            copy.start()

    def wait_out(self, block) -> None:
        """Wait until a block has left its buffer, if there is one."""

        @pl.when(block >= 0)
        def _():
            for copy in self._out_copies(block):
                copy.wait()

    def _q_copies(self, block):
        buffer, b = block % 2, self.buffers
        here, there = self._operands(buffer), self._operands(block)
        copies = [pltpu.make_async_copy(self.q.at[there], b.q.at[here], b.arrived.at[buffer, 0])]
        if self.tree is not None:
            copies.append(pltpu.make_async_copy(self.tree.at[there], b.tree.at[here], b.arrived.at[buffer, 1]))
        return copies

    def _operands(self, block):
        return pl.ds(block * self.config.operands, self.config.operands)

    def _out_copies(self, block):
        buffer, b = block % 2, self.buffers
        here, there = self._operands(buffer), self._operands(block)
        copies = [pltpu.make_async_copy(b.out.at[here], self.out.at[there], b.left.at[buffer, 0])]
        if self.lse is not None:
            copies.append(pltpu.make_async_copy(b.lse.at[buffer], self.lse.at[block], b.left.at[buffer, 1]))
        return copies
