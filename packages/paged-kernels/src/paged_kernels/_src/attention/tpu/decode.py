"""The kernel body for decode: two loops, over blocks of query rows, and over blocks of sub-blocks."""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from paged_kernels._src.attention.tpu import softmax
from paged_kernels._src.attention.tpu.config import Config
from paged_kernels._src.attention.tpu.copies import Cursor, PageCopies, RowStream
from paged_kernels._src.attention.tpu.memory import KernelInputs, Scratch
from paged_kernels._src.attention.tpu.schedule import Tiles
from paged_kernels._src.attention.tpu.subblocks import SubBlock, SubBlockStream
from paged_kernels._src.attention.tpu.tile_attention import Keys, TileAttention
from paged_kernels._src.integers import cdiv
from paged_kernels._src.tpu.registers import LANES


def decode_kernel(  # noqa: PLR0917 -- pallas_call passes references by position
    tiles: Tiles, block_starts, inputs: KernelInputs, out, lse, scratch: Scratch, *, config: Config
) -> None:
    """Compute every block of query rows, like `attention_kernel`, where each sequence has one row.

    Args:
        tiles: the work, in SMEM; each tile is one row.
        block_starts: the number of blocks of pages before each block of rows, then their total, in SMEM.
        inputs: queries, pages and parameters.
        out: the output in HBM, in the order of the queries.
        lse: the packed log-sum-exp in HBM, one array per block of rows; or None.
        scratch: VMEM, SMEM and semaphores.
        config: the static facts.
    """
    copies = PageCopies(config=config, data=inputs.data, scales=inputs.scales, buffers=scratch.pages)
    stream = SubBlockStream(
        config=config,
        tiles=tiles,
        page_table=inputs.page_table,
        copies=copies,
        buffers=scratch.pages,
        notes=scratch.notes,
    )
    rows = RowStream(config=config, q=inputs.q, tree=inputs.tree, out=out, lse=lse, buffers=scratch.rows)
    attention = TileAttention(config=config, tiles=tiles, inputs=inputs, scratch=scratch)
    decode = DecodeAttention(config=config, tiles=tiles, scratch=scratch, attention=attention, stream=stream)

    def attend_block(block, next_block: Cursor, row_buffer) -> Cursor:
        ahead = block + config.buffers - 1
        next_block = stream.assign(next_block)
        stream.wait_ids(ahead)
        steady = decode.is_one_tile(block) & stream.is_whole(ahead)

        @pl.when(steady)
        def _():
            decode.begin_tile(block)
            stream.wait_whole(block)
            decode.attend_whole(block, row_buffer, ahead)
            decode.end_tile(block, row_buffer)

        @pl.when(jnp.logical_not(steady))
        def _():
            stream.wait(block)
            decode.clear_unseen(block)
            decode.attend_subblocks(block, row_buffer, ahead)

        return next_block

    def attend_rows(row_block, buffer, next_block: Cursor) -> Cursor:
        attention.clear_output(buffer)
        first, end = block_starts[row_block], block_starts[row_block + 1]
        return jax.lax.fori_loop(first, end, lambda block, p: attend_block(block, p, buffer), next_block)

    attention.for_row_blocks(rows, attend_rows, stream.begin)
    stream.end(block_starts[config.q_blocks])


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeAttention:
    """What happens to a block of sub-blocks, which belong to one tile or to several."""

    config: Config
    tiles: Tiles
    scratch: Scratch
    attention: TileAttention
    stream: SubBlockStream

    def is_one_tile(self, block) -> jax.Array:
        """True if the block is whole, all of it belongs to one tile, and that tile's row sees every key."""
        first, last = self.stream.subblock(block, 0), self.stream.subblock(block, self.config.subblocks - 1)
        one = (first.tile == last.tile) & self.stream.is_whole(block)
        return one & self.attention.sees_all(self._cursor(block, first))

    def begin_tile(self, block) -> None:
        """Reset the state if a tile begins with this block."""
        first = self.stream.subblock(block, 0)
        pl.when(first.page == self.tiles.first_page[first.tile])(self.attention.reset)

    def end_tile(self, block, row_buffer) -> None:
        """Write the row to the output if its tile ends with this block."""
        c, last = self.config, self.stream.subblock(block, self.config.subblocks - 1)

        @pl.when(last.page + last.count == self.tiles.end_page[last.tile])
        def _():
            def finish(head, _):
                self._finish(head, self.attention.load(head), last, row_buffer)

            jax.lax.fori_loop(0, c.kv_heads, finish, None)

    def attend_whole(self, block, row_buffer, ahead) -> None:
        """Attend a block of one tile whose row sees every key, and start the copies of the whole block `ahead`."""
        first = self.stream.subblock(block, 0)
        keys = self.attention.whole_keys(self._cursor(block, first), self.stream.buffer(block))

        def add_keys(_, head, x):
            self.attention.store(head, self.attention.add_keys(self.attention.load(head), head, x, keys))

        start = functools.partial(self.stream.start_subblock, ahead, whole=True)
        self._attend([keys], [self._operand(first, row_buffer)], add_keys, start)

    def attend_subblocks(self, block, row_buffer, ahead) -> None:
        """Attend the sub-blocks of a block, each masked and with the state of its own tile.

        After each sub-block the row is written to the output. Also start the copies of the block `ahead`.
        """
        c = self.config
        self.attention.spread_scales(self.stream.buffer(block))
        subblocks = [self.stream.subblock(block, i) for i in range(c.subblocks)]
        keys = [self._keys(i, subblock, block, row_buffer) for i, subblock in enumerate(subblocks)]

        def add_keys(i, head, x):
            self._add_keys(head, x, subblocks[i], keys[i], row_buffer)

        operands = [self._operand(subblock, row_buffer) for subblock in subblocks]
        self._attend(keys, operands, add_keys, functools.partial(self.stream.start_subblock, ahead))

    def _attend(self, keys: list[Keys], operands: list, add_keys: Callable, start_subblock: Callable) -> None:
        """Run `add_keys(i, head, logits)` for all keys and heads, and `start_subblock(i)` for all sub-blocks.

        The compiler does not move a load of keys across the start of a copy. So a few copies are started at a time,
        after the products of the next head. There they fill the waits of this head's softmax.
        """
        subblocks, last_head = self.config.subblocks, self.config.kv_heads - 1

        def score(i, head):
            return self.attention.score(head, operands[i], keys[i])

        def attend_heads(heads):
            work = list(itertools.product(range(len(keys)), heads))

            def start_share(n):
                for i in range(cdiv(n * subblocks, len(work)), cdiv((n + 1) * subblocks, len(work))):
                    pl.when(heads[-1] == last_head)(functools.partial(start_subblock, i))

            x = score(*work[0])
            for n, after in enumerate(work[1:]):
                x_after = score(*after)
                start_share(n)
                add_keys(*work[n], x)
                x = x_after
            add_keys(*work[-1], x)
            start_share(len(work) - 1)

        self.attention.for_parts(attend_heads)

    def _add_keys(self, head, x, subblock: SubBlock, keys: Keys, row_buffer) -> None:
        """Add a head's logits and values to its state. The first sub-block of a tile starts a new state."""
        begins = subblock.page == self.tiles.first_page[subblock.tile]
        state = jax.tree.map(
            lambda new, old: jnp.where(begins, new, old), self.attention.initial(head), self.attention.load(head)
        )
        state = self.attention.add_keys(state, head, x, keys)
        self.attention.store(head, state)
        self._finish(head, state, subblock, row_buffer)

    def _finish(self, head, state: softmax.State, subblock: SubBlock, row_buffer) -> None:
        """Write the row as it is after this sub-block. Later sub-blocks of the tile write it again."""
        c, s = self.config, self.scratch
        out = s.rows.out.at[self._operand(subblock, row_buffer), head]
        seen = state.m > softmax.MASKED
        wide = jnp.concatenate([seen] * (c.out_lanes // LANES), axis=1)
        out[...] = jnp.where(wide, softmax.output(state), 0).astype(out.dtype)
        if not c.has_lse:
            return
        place = jnp.where(subblock.count > 0, self.tiles.row_lo[subblock.tile], c.operands) * c.kv_heads + head
        lse = s.lse.at[pl.ds(pl.multiple_of(place * c.part_rows, c.part_rows), c.part_rows)]
        lse[...] = jnp.where(seen, softmax.log_sum_exp(state), -jnp.inf)

    def _keys(self, i: int, subblock: SubBlock, block, row_buffer) -> Keys:
        operand, buffer = self._operand(subblock, row_buffer), self.stream.buffer(block)
        return self.attention.masked_keys(subblock.tile, subblock.page, i, operand, buffer)

    def clear_unseen(self, block) -> None:
        """Set values that no row sees to zero, because they may be infinite or NaN."""
        c = self.config
        if not c.clears_unseen:
            return
        subblocks = [self.stream.subblock(block, i) for i in range(c.subblocks)]
        for i, (subblock, clean) in enumerate([(subblock, self._clean_pages(subblock)) for subblock in subblocks]):
            self._clear_subblock(block, i, subblock, clean)

    def _clean_pages(self, subblock: SubBlock):
        """The number of pages, counted from the sub-block's first, in which every key is seen."""
        c = self.config
        first, end = self.attention.keys_of_tile(subblock.tile)
        pages = jnp.minimum(subblock.count, end // c.page_size - subblock.page)
        pages = jnp.where(first > subblock.page * c.page_size, 0, pages)
        return jnp.where(subblock.count > 0, pages, c.subblock_pages)  # an empty sub-block needs no clearing

    def _clear_subblock(self, block, i: int, subblock: SubBlock, clean) -> None:
        c = self.config
        first, end = self.attention.keys_of_tile(subblock.tile)
        pages = self.scratch.pages.kv.at[self.stream.buffer(block)]

        def clear(page, _):
            values = pages.at[:, i * c.subblock_pages + page, :, c.layout.v_lanes]
            p = (subblock.page + page) * c.page_size + jax.lax.broadcasted_iota(jnp.int32, values.shape, 1)
            values[...] = jnp.where((p >= first) & (p < end), values[...], jnp.zeros_like(values))

        jax.lax.fori_loop(clean, c.subblock_pages, clear, None)

    def _operand(self, subblock: SubBlock, row_buffer):
        """The sub-block's row in the buffers. An empty sub-block has the place after the last."""
        c = self.config
        return jnp.where(subblock.count > 0, row_buffer * c.operands + self.tiles.row_lo[subblock.tile], 2 * c.operands)

    def _cursor(self, block, subblock: SubBlock) -> Cursor:
        return Cursor(block=block, tile=subblock.tile, page=subblock.page)
