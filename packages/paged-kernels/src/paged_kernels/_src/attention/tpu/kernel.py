"""The kernel body for any batch: three loops, over blocks of query rows, tiles, and blocks of pages."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from paged_kernels._src.attention.tpu.config import Config
from paged_kernels._src.attention.tpu.copies import Cursor, PageCopies, PageStream, RowStream
from paged_kernels._src.attention.tpu.memory import KernelInputs, Scratch
from paged_kernels._src.attention.tpu.schedule import Tiles
from paged_kernels._src.attention.tpu.tile_attention import TileAttention


def attention_kernel(tiles: Tiles, inputs: KernelInputs, out, lse, scratch: Scratch, *, config: Config) -> None:
    """Compute every block of query rows, and write its output and log-sum-exp.

    Rows that belong to no tile get 0 and -inf.

    Args:
        tiles: the work, in SMEM.
        inputs: queries, pages and parameters.
        out: the output in HBM, in the order of the queries.
        lse: the packed log-sum-exp in HBM, one array per block of rows; or None.
        scratch: VMEM, SMEM and semaphores.
        config: the static facts.
    """
    copies = PageCopies(config=config, data=inputs.data, scales=inputs.scales, buffers=scratch.pages)
    stream = PageStream(config=config, tiles=tiles, page_table=inputs.page_table, copies=copies, buffers=scratch.pages)
    rows = RowStream(config=config, q=inputs.q, tree=inputs.tree, out=out, lse=lse, buffers=scratch.rows)
    attention = TileAttention(config=config, tiles=tiles, inputs=inputs, scratch=scratch)

    def attend_block(_, cursors: tuple[Cursor, Cursor], buffer):
        at, ahead = cursors
        all_visible = attention.sees_all(at)
        steady = all_visible & stream.is_whole(ahead)

        @pl.when(steady)
        def _():  # without a branch, the compiler starts the copies beside the arithmetic
            stream.prepare(ahead)
            stream.wait_whole(at)
            attention.attend_whole(at, buffer, stream.buffer(at))
            stream.start_whole(ahead)

        @pl.when(jnp.logical_not(steady))
        def _():
            stream.start(ahead)
            stream.wait(at)
            pl.when(all_visible)(lambda: attention.attend_whole(at, buffer, stream.buffer(at)))
            pl.when(jnp.logical_not(all_visible))(
                lambda: attention.attend_subblocks(at, stream.count(at), buffer, stream.buffer(at))
            )

        return stream.advance(at), stream.advance(ahead)

    def attend_tile(tile, cursors, buffer):
        blocks = pl.cdiv(tiles.end_page[tile] - tiles.first_page[tile], config.kv_pages)
        cursors = jax.lax.fori_loop(0, blocks, lambda i, c: attend_block(i, c, buffer), cursors)
        attention.finish(tile, buffer)
        return cursors

    def attend_rows(block, buffer, cursors):
        first, end = tiles.block_starts[block], tiles.block_starts[block + 1]
        pl.when((first == end) | jnp.logical_not(attention.fills_block(first)))(lambda: attention.clear_output(buffer))
        return jax.lax.fori_loop(first, end, lambda tile, c: attend_tile(tile, c, buffer), cursors)

    def begin():
        cursors = stream.begin()
        attention.reset()
        return cursors

    attention.for_row_blocks(rows, attend_rows, begin)
