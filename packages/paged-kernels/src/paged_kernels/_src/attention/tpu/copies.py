"""The kernel's copies between HBM and the core: pages, page ids, query rows and output rows.

Blocks of pages pass through `buffers` buffers in VMEM, in the order in which they are used. The order does not depend
on tiles: the pages of the next sequence are copied while those of this one are used.

    step          0        1        2        3            with 4 buffers
    page ids  |5 . . . |6 . . . |7 . . . |8 . . .         IDS_AHEAD steps before the pages
    pages     |3 . . . |4 . . . |5 . . . |6 . . .         buffers - 1 steps before use
    attend    |   0    |   1    |   2    |   3

Each buffer has its own semaphores (in decode, one for each sub-block). So no wait can be satisfied by the copies of
another block.
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
"""The most page copies of a whole block in one unrolled loop. Their address computations then overlap."""

IDS_AHEAD = 2
"""How many blocks ahead page ids are requested. Their copies wait behind the copies of pages."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cursor:
    """One block of pages, in the order of use."""

    block: jax.Array
    """The number of blocks before this one."""
    tile: jax.Array
    """The block's tile. Equals the number of tiles if there is no such block."""
    page: jax.Array
    """The block's first page, as an index in the sequence's page table."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PageBuffers:
    """The memory of the page copies."""

    kv: Memory  # [buffers, kv_heads, kv_pages, page_size, storage_lanes]
    kv_arrived: Memory  # semaphores [buffers, subblocks in decode, else 1]
    scales: Memory  # [buffers, *Config.scales_shape], or None
    scales_arrived: Memory  # semaphores, as kv_arrived; or None
    ids: Memory  # SMEM [(IDS_AHEAD + 1) * subblocks * ids_per_copy]
    ids_arrived: Memory  # semaphores [IDS_AHEAD + 1]

    @classmethod
    def shapes(cls, c: Config) -> "PageBuffers":
        """Returns what to allocate."""
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
    """Copies of single pages, and of their scales if they have any, into `PageBuffers`."""

    config: Config
    data: Memory  # HBM [pages, kv_heads, page_size, storage_lanes]
    scales: Memory  # HBM [pages, kv_heads, 1, scale_lanes], or None
    buffers: PageBuffers

    def destination(self, buffer, first, count: int, subblock=0) -> Destination:
        """Returns `count` places of a buffer, from place `first` on.

        Copies to the same `Destination` share their address computations. `subblock` selects the semaphore that counts
        them.
        """
        b, arrived = self.buffers, (buffer, subblock)
        kv = b.kv.at[buffer, :, pl.ds(first, count)]
        if self.scales is None:
            return Destination(kv=kv, kv_arrived=b.kv_arrived.at[arrived])
        scales = b.scales.at[buffer, pl.ds(first, count)]
        return Destination(
            kv=kv, kv_arrived=b.kv_arrived.at[arrived], scales=scales, scales_arrived=b.scales_arrived.at[arrived]
        )

    def start(self, page_id, target: Destination, i: int, exists: jax.Array | bool = True) -> None:
        """Start the copy of a page to place `i` of the target. If the page does not exist, the copy has zero bytes."""
        heads = pl.ds(0, self.config.kv_heads if exists is True else jnp.where(exists, self.config.kv_heads, 0))
        copies = [(self.data.at[page_id, heads], target.kv.at[heads, i], target.kv_arrived)]
        if target.scales is not None:
            copies.append((self.scales.at[page_id, heads, 0], target.scales.at[i, heads], target.scales_arrived))
        for source, place, arrived in copies:
            pltpu.make_async_copy(source, place, arrived).start()

    def wait(self, buffer, count, subblock=0) -> None:
        """Wait for `count` pages of one semaphore.

        A semaphore counts bytes, so one wait serves all of them.
        """
        b, arrived = self.buffers, (buffer, subblock)
        waits = [(b.kv.at[buffer, :, pl.ds(0, count)], b.kv_arrived.at[arrived])]
        if self.scales is not None:
            waits.append((b.scales.at[buffer, pl.ds(0, count)], b.scales_arrived.at[arrived]))
        for pages, arrived in waits:
            pltpu.make_async_copy(pages, pages, arrived).wait()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PageStream:
    """Blocks of pages in flight from HBM to VMEM.

    Only pages that the block's tile sees are copied. The other places of the buffer hold arbitrary data.
    """

    config: Config
    tiles: Tiles
    page_table: Memory  # HBM [seqs, 1, ids_per_seq]
    copies: PageCopies
    buffers: PageBuffers

    def begin(self) -> tuple[Cursor, Cursor]:
        """Start the first `buffers - 1` blocks.

        Returns the cursor of the first block, and of the first block that is not started.
        """
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
        """Start the copies of block `at`, and of the page ids of a later block. Does nothing past the last block."""

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
        """Wait for the page ids of block `at`, and request those of a later block."""
        self._ids_copy(at).wait()
        for _ in range(IDS_AHEAD):
            at = self.advance(at)
        self._start_ids(at)

    def start_whole(self, at: Cursor) -> None:
        """Start the copies of a whole block, whose page ids have arrived."""
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
        """Wait for a whole block."""
        self.copies.wait(self.buffer(at), self.config.kv_pages)

    def buffer(self, at: Cursor) -> jax.Array:
        """The buffer of block `at`."""
        return at.block % self.config.buffers

    def advance(self, at: Cursor) -> Cursor:
        """Returns the cursor of the block after `at`."""
        page = at.page + self.config.kv_pages
        done = page >= self.tiles.end_page[at.tile]
        tile = jnp.minimum(at.tile + done.astype(jnp.int32), self._num_tiles())
        return Cursor(block=at.block + 1, tile=tile, page=jnp.where(done, self.tiles.first_page[tile], page))

    def count(self, at: Cursor) -> jax.Array:
        """The number of pages in block `at`; 0 past the last block."""
        return jnp.minimum(self.tiles.end_page[at.tile] - at.page, self.config.kv_pages)

    def is_whole(self, at: Cursor) -> jax.Array:
        """True if the block has `kv_pages` pages."""
        return self.count(at) == self.config.kv_pages

    def _num_tiles(self) -> jax.Array:
        return self.tiles.block_starts[self.config.q_blocks]

    def _start_ids(self, at: Cursor) -> None:
        @pl.when(self.count(at) > 0)
        def _():
            self._ids_copy(at).start()

    def _ids_copy(self, at: Cursor):
        place = at.block % (IDS_AHEAD + 1)
        first = pl.multiple_of(at.page // LANES * LANES, LANES)
        source = self.page_table.at[self.tiles.seq[at.tile], 0, pl.ds(first, self.config.ids_per_copy)]
        start = pl.multiple_of(place * self.config.ids_per_copy, LANES)
        target = self.buffers.ids.at[pl.ds(start, self.config.ids_per_copy)]
        return pltpu.make_async_copy(source, target, self.buffers.ids_arrived.at[place])

    def _start_page(self, at: Cursor, i) -> None:
        page_id = self.buffers.ids[at.block % (IDS_AHEAD + 1) * self.config.ids_per_copy + at.page % LANES + i]
        self.copies.start(page_id, self.copies.destination(self.buffer(at), i, 1), 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RowBuffers:
    """The memory of the copies of query, output and log-sum-exp rows: two buffers each.

    In decode `q`, `tree` and `out` have one operand more, for sub-blocks without a sequence. It is never copied.
    """

    q: Memory  # [2 * operands, parts, part_rows, q_lanes]
    tree: Memory  # [2 * operands, operand_tokens, tree_lanes], or None
    out: Memory  # [2 * operands, parts, part_rows, out_lanes]
    lse: Memory  # [2, lse_rows / 128, 128], or None
    arrived: Memory  # semaphores [2, 2]: for q and tree
    left: Memory  # semaphores [2, 2]: for out and lse

    @classmethod
    def shapes(cls, c: Config) -> "RowBuffers":
        """Returns what to allocate."""
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
    """Blocks of query rows in flight to VMEM, and of output rows to HBM. Block `b` uses buffer `b % 2`."""

    config: Config
    q: Memory  # HBM [q_blocks * operands, parts, part_rows, q_lanes]
    tree: Memory  # HBM [q_blocks * operands, operand_tokens, tree_lanes], or None
    out: Memory  # HBM [q_blocks * operands, parts, part_rows, out_lanes]
    lse: Memory  # HBM [q_blocks, lse_rows / 128, 128], or None
    buffers: RowBuffers

    def start_q(self, block) -> None:
        """Start the copy of a block of query rows. Does nothing past the last block."""

        @pl.when(block < self.config.q_blocks)
        def _():
            for copy in self._q_copies(block):
                copy.start()

    def wait_q(self, block) -> None:
        """Wait until a block of query rows is in its buffer."""
        for copy in self._q_copies(block):
            copy.wait()

    def start_out(self, block) -> None:
        """Start the copy of a finished block to HBM."""
        for copy in self._out_copies(block):
            copy.start()

    def wait_out(self, block) -> None:
        """Wait until a block has left its buffer. Does nothing before the first block."""

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
