"""The kernel's body for decode: two loops, over blocks of query rows, and over blocks of chunks of pages."""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from paged_kernels._src.attention.tpu import softmax
from paged_kernels._src.attention.tpu.chunks import Chunk, ChunkStream
from paged_kernels._src.attention.tpu.config import Config
from paged_kernels._src.attention.tpu.copies import Cursor, PageCopies, RowStream
from paged_kernels._src.attention.tpu.memory import Inputs, Scratch
from paged_kernels._src.attention.tpu.schedule import Tiles
from paged_kernels._src.attention.tpu.step import Keys, Step
from paged_kernels._src.tpu.registers import LANES, cdiv


def decode_kernel(  # noqa: PLR0917 -- pallas_call passes references by position
    tiles: Tiles, block_starts, inputs: Inputs, out, lse, scratch: Scratch, *, config: Config
) -> None:
    """Attend every block of query rows, as `attention_kernel` does, where each sequence has one row.

    Args:
        tiles: the work (SMEM), each tile a row.
        block_starts: how many blocks of chunks come before each block of rows, and their number (SMEM).
        inputs: what is attended, and over what.
        out: the output, in HBM in the order of the queries.
        lse: the log-sum-exp, in HBM, a packed row set a block, or None.
        scratch: VMEM, SMEM and semaphores.
        config: the static facts.
    """
    copies = PageCopies(config=config, data=inputs.data, scales=inputs.scales, buffers=scratch.pages)
    stream = ChunkStream(
        config=config, tiles=tiles, table=inputs.table, copies=copies, buffers=scratch.pages, notes=scratch.notes
    )
    rows = RowStream(config=config, q=inputs.q, tree=inputs.tree, out=out, lse=lse, buffers=scratch.rows)
    step = Step(config=config, tiles=tiles, inputs=inputs, scratch=scratch)
    decode = DecodeStep(config=config, tiles=tiles, scratch=scratch, step=step, stream=stream)

    def attend_block(block, planned: Cursor, row_slot) -> Cursor:
        ahead = block + config.buffers - 1
        planned = stream.plan(planned)
        stream.wait_ids(ahead)
        steady = decode.is_one_tile(block) & stream.is_whole(ahead)

        @pl.when(steady)
        def _():
            decode.begin_tile(block)
            stream.wait_whole(block)
            decode.attend_whole(block, row_slot, ahead)
            decode.end_tile(block, row_slot)

        @pl.when(jnp.logical_not(steady))
        def _():
            stream.wait(block)
            decode.clear_unseen(block)
            decode.attend_chunks(block, row_slot, ahead)

        return planned

    def attend_rows(row_block, slot, planned: Cursor) -> Cursor:
        step.clear_output(slot)
        first, end = block_starts[row_block], block_starts[row_block + 1]
        return jax.lax.fori_loop(first, end, lambda block, p: attend_block(block, p, slot), planned)

    step.for_row_blocks(rows, attend_rows, stream.begin)
    stream.end(block_starts[config.q_blocks])


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeStep:
    """What happens to a block of chunks: one tile's, or several tiles', of which each chunk may be the last."""

    config: Config
    tiles: Tiles
    scratch: Scratch
    step: Step
    stream: ChunkStream

    def is_one_tile(self, block) -> jax.Array:
        """Whether the block is whole, of one tile, and its row sees every key."""
        first, last = self.stream.chunk(block, 0), self.stream.chunk(block, self.config.chunks - 1)
        one = (first.tile == last.tile) & self.stream.is_whole(block)
        return one & self.step.sees_all(self._cursor(block, first))

    def begin_tile(self, block) -> None:
        """Reset the state, if a tile begins with the block."""
        first = self.stream.chunk(block, 0)
        pl.when(first.page == self.tiles.first_page[first.tile])(self.step.reset)

    def end_tile(self, block, row_slot) -> None:
        """Put the row into the output, if its tile ends with the block."""
        c, last = self.config, self.stream.chunk(block, self.config.chunks - 1)

        @pl.when(last.page + last.count == self.tiles.end_page[last.tile])
        def _():
            def finish(head, _):
                self._finish(head, self.step.load(head), last, row_slot)

            jax.lax.fori_loop(0, c.kv_heads, finish, None)

    def attend_whole(self, block, row_slot, ahead) -> None:
        """Take a block of one tile, of which its row sees every key, and start the copies of a whole block ahead."""
        first = self.stream.chunk(block, 0)
        keys = self.step.whole_keys(self._cursor(block, first), self.stream.slot(block))

        def absorb(_, head, x):
            self.step.store(head, self.step.absorb(self.step.load(head), head, x, keys))

        start = functools.partial(self.stream.start_chunk, ahead, whole=True)
        self._attend([keys], [self._operand(first, row_slot)], absorb, start)

    def attend_chunks(self, block, row_slot, ahead) -> None:
        """Take the chunks of a block, each masked, into the states of their tiles, and put those into the output.

        Start the copies of a block ahead.
        """
        c = self.config
        self.step.spread_scales(self.stream.slot(block))
        chunks = [self.stream.chunk(block, i) for i in range(c.chunks)]
        keys = [self._keys(i, chunk, block, row_slot) for i, chunk in enumerate(chunks)]

        def absorb(i, head, x):
            self._absorb(head, x, chunks[i], keys[i], row_slot)

        operands = [self._operand(chunk, row_slot) for chunk in chunks]
        self._attend(keys, operands, absorb, functools.partial(self.stream.start_chunk, ahead))

    def _attend(self, keys: list[Keys], operands: list, absorb: Callable, start_chunk: Callable) -> None:
        """Run `absorb(i, head, logits)` for all keys and heads, and beside them `start_chunk(i)` for all chunks.

        The compiler moves no load of keys over the start of a copy. So the copies are started a few at a time, each
        time after the products of the next head, where they fill the latencies of this head's softmax.
        """
        chunks, last_head = self.config.chunks, self.config.kv_heads - 1

        def score(i, head):
            return self.step.score(head, operands[i], keys[i])

        def attend_heads(heads):
            work = list(itertools.product(range(len(keys)), heads))

            def start_share(n):
                for i in range(cdiv(n * chunks, len(work)), cdiv((n + 1) * chunks, len(work))):
                    pl.when(heads[-1] == last_head)(functools.partial(start_chunk, i))

            x = score(*work[0])
            for n, after in enumerate(work[1:]):
                x_after = score(*after)
                start_share(n)
                absorb(*work[n], x)
                x = x_after
            absorb(*work[-1], x)
            start_share(len(work) - 1)

        self.step.for_parts(attend_heads)

    def _absorb(self, head, x, chunk: Chunk, keys: Keys, row_slot) -> None:
        """Take a head's logits and values into its state: a new one, if the chunk is its tile's first."""
        begins = chunk.page == self.tiles.first_page[chunk.tile]
        state = jax.tree.map(
            lambda new, old: jnp.where(begins, new, old), self.step.initial(head), self.step.load(head)
        )
        state = self.step.absorb(state, head, x, keys)
        self.step.store(head, state)
        self._finish(head, state, chunk, row_slot)

    def _finish(self, head, state: softmax.State, chunk: Chunk, row_slot) -> None:
        """Put the row into the output as it is after a chunk; the tile's later chunks do so again."""
        c, s = self.config, self.scratch
        out = s.rows.out.at[self._operand(chunk, row_slot), head]
        seen = state.m > softmax.MASKED
        wide = jnp.concatenate([seen] * (c.out_lanes // LANES), axis=1)
        out[...] = jnp.where(wide, softmax.output(state), 0).astype(out.dtype)
        if not c.has_lse:
            return
        place = jnp.where(chunk.count > 0, self.tiles.row_lo[chunk.tile], c.operands) * c.kv_heads + head
        lse = s.lse.at[pl.ds(pl.multiple_of(place * c.rows, c.rows), c.rows)]
        lse[...] = jnp.where(seen, softmax.log_sum_exp(state), -jnp.inf)

    def _keys(self, i: int, chunk: Chunk, block, row_slot) -> Keys:
        operand, slot = self._operand(chunk, row_slot), self.stream.slot(block)
        return self.step.masked_keys(chunk.tile, chunk.page, i, operand, slot)

    def clear_unseen(self, block) -> None:
        """Zero the values in the chunks of a block that no row sees: they may be anything."""
        c = self.config
        if not c.clears_unseen:
            return
        chunks = [self.stream.chunk(block, i) for i in range(c.chunks)]
        for i, (chunk, clean) in enumerate([(chunk, self._clean_pages(chunk)) for chunk in chunks]):
            self._clear_chunk(block, i, chunk, clean)

    def _clean_pages(self, chunk: Chunk):
        """How many pages of a chunk, from its first, are seen whole."""
        c = self.config
        first, end = self.step.seen(chunk.tile)
        pages = jnp.minimum(chunk.count, end // c.page_size - chunk.page)
        pages = jnp.where(first > chunk.page * c.page_size, 0, pages)
        return jnp.where(chunk.count > 0, pages, c.chunk_pages)  # a chunk of no sequence is attended for nobody

    def _clear_chunk(self, block, i: int, chunk: Chunk, clean) -> None:
        c = self.config
        first, end = self.step.seen(chunk.tile)
        pages = self.scratch.pages.kv.at[self.stream.slot(block)]

        def clear(page, _):
            values = pages.at[:, i * c.chunk_pages + page, :, c.layout.v_lanes]
            p = (chunk.page + page) * c.page_size + jax.lax.broadcasted_iota(jnp.int32, values.shape, 1)
            values[...] = jnp.where((p >= first) & (p < end), values[...], jnp.zeros_like(values))

        jax.lax.fori_loop(clean, c.chunk_pages, clear, None)

    def _operand(self, chunk: Chunk, row_slot):
        """The place of the chunk's row in the buffers; one past the last for a chunk of no sequence."""
        c = self.config
        return jnp.where(chunk.count > 0, row_slot * c.operands + self.tiles.row_lo[chunk.tile], 2 * c.operands)

    def _cursor(self, block, chunk: Chunk) -> Cursor:
        return Cursor(step=block, tile=chunk.tile, page=chunk.page)
