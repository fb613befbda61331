"""The kernel's body: three loops, over blocks of query rows, their tiles, and each tile's blocks of pages."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paged_kernels.attention.mask import fully_visible, key_range, visible
from paged_kernels.attention.tpu import softmax
from paged_kernels.attention.tpu.config import Config, Memory
from paged_kernels.attention.tpu.copies import Cursor, PageBuffers, PageStream, RowBuffers, RowStream
from paged_kernels.attention.tpu.schedule import Tiles
from paged_kernels.mosaic import LANES, SUBLANES

FEW_ROWS = 64
HEADS_AT_ONCE = 8
"""How many heads are attended side by side, where a head has fewer rows than `FEW_ROWS`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Scratch:
    """The kernel's memory. `m`, `l` and `acc` are the softmax state, `m`, `l` and `lse` repeated along lanes."""

    pages: PageBuffers
    rows: RowBuffers
    m: Memory  # [kv_heads, rows, 128]
    l: Memory  # [kv_heads, rows, 128]  # noqa: E741
    acc: Memory  # [kv_heads, rows, out_lanes]
    lse: Memory  # [lse_rows, 128]

    @classmethod
    def shapes(cls, c: Config) -> "Scratch":
        """What to allocate."""
        return cls(
            pages=PageBuffers.shapes(c),
            rows=RowBuffers.shapes(c),
            m=pltpu.VMEM((c.kv_heads, c.rows, LANES), jnp.float32),
            l=pltpu.VMEM((c.kv_heads, c.rows, LANES), jnp.float32),
            acc=pltpu.VMEM((c.kv_heads, c.rows, c.out_lanes), jnp.float32),
            lse=pltpu.VMEM((c.lse_rows, LANES), jnp.float32),
        )


def attention_kernel(  # noqa: PLR0917 -- pallas_call passes references by position
    tiles: Tiles, table, q, pages, out, lse, scratch: Scratch, *, config: Config
) -> None:
    """Attend every block of query rows and write its output and log-sum-exp; rows of no tile get 0 and -inf.

    Args:
        tiles: the work (SMEM).
        table: the page ids, in HBM as `arrange_table` has them.
        q: the queries, in HBM as `arrange_q` has them.
        pages: `KVPages.data`, in HBM.
        out: the output, in HBM in the order of `q`.
        lse: the log-sum-exp, in HBM, a packed row set a block.
        scratch: VMEM, SMEM and semaphores.
        config: the static facts.
    """
    stream = PageStream(config=config, tiles=tiles, table=table, pages=pages, buffers=scratch.pages)
    rows = RowStream(config=config, q=q, out=out, lse=lse, buffers=scratch.rows)
    step = Step(config=config, tiles=tiles, scratch=scratch)

    def attend_block(_, cursors: tuple[Cursor, Cursor], slot):
        at, ahead = cursors
        steady = step.sees_all(at) & stream.is_whole(ahead)

        @pl.when(steady)
        def _():  # the copies are started beside the arithmetic, for there is no branch between
            stream.prepare(ahead)
            stream.wait_whole(at)
            step.attend_whole(slot, stream.slot(at))
            stream.start_whole(ahead)

        @pl.when(jnp.logical_not(steady))
        def _():
            stream.start(ahead)
            stream.wait(at)
            step.attend_chunks(at, stream.count(at), slot, stream.slot(at))

        return stream.advance(at), stream.advance(ahead)

    def attend_tile(tile, cursors, slot):
        step.reset()
        blocks = pl.cdiv(tiles.end_page[tile] - tiles.first_page[tile], config.kv_pages)
        cursors = jax.lax.fori_loop(0, blocks, lambda i, c: attend_block(i, c, slot), cursors)
        step.finish(tile, slot)
        return cursors

    def attend_rows(block, cursors):
        slot = block % 2
        rows.start_q(block + 1)
        rows.wait_out(block - 2)
        rows.wait_q(block)
        step.clear_output(slot)
        first, end = tiles.block_starts[block], tiles.block_starts[block + 1]
        cursors = jax.lax.fori_loop(first, end, lambda tile, c: attend_tile(tile, c, slot), cursors)
        step.pack_lse(slot)
        rows.start_out(block)
        return cursors

    rows.start_q(0)
    jax.lax.fori_loop(0, config.q_blocks, attend_rows, stream.begin())
    rows.wait_out(config.q_blocks - 2)
    rows.wait_out(config.q_blocks - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """What happens to a tile's softmax state and to its rows of the output."""

    config: Config
    tiles: Tiles
    scratch: Scratch

    def reset(self) -> None:
        """The state before any key."""
        s = self.scratch
        s.m[...] = jnp.full_like(s.m, softmax.MASKED)
        s.l[...] = jnp.zeros_like(s.l)
        s.acc[...] = jnp.zeros_like(s.acc)

    def sees_all(self, at: Cursor) -> jax.Array:
        """Whether every row of the tile sees every key of block `at`."""
        first_key = at.page * self.config.page_size
        keys = (first_key, first_key + self.config.block_tokens)
        return fully_visible(self.config.spec, self._positions(at.tile), keys, self.tiles.kv_len[at.tile])

    def attend_whole(self, q_slot, kv_slot) -> None:
        """Take a block of which every row sees every key."""
        self._attend_heads(q_slot, self.scratch.pages.kv.at[kv_slot])

    def attend_chunks(self, at: Cursor, pages, q_slot, kv_slot) -> None:
        """Take the first `pages` pages of block `at`, masked, in as few chunks as hold them."""
        c, tiles, tile = self.config, self.tiles, at.tile
        size, position, kv_len = c.chunk_tokens, tiles.position[tile], tiles.kv_len[tile]
        first_visible, end_visible = key_range(c.spec, *self._positions(tile), kv_len)

        def attend_chunk(chunk, _):
            start = pl.multiple_of(chunk * size, c.page_size)
            p = at.page * c.page_size + start + jax.lax.broadcasted_iota(jnp.int32, (c.rows, size), 1)
            mask = visible(c.spec, position + self._token_row(size), p, kv_len)
            p = at.page * c.page_size + start + jax.lax.broadcasted_iota(jnp.int32, (size, c.out_lanes), 0)
            real = (p >= first_visible) & (p < end_visible)
            self._attend_heads(q_slot, self.scratch.pages.kv.at[kv_slot, :, pl.ds(start, size)], mask, real)

        jax.lax.fori_loop(0, pl.cdiv(pages, c.kv_pages // c.chunks), attend_chunk, None)

    def finish(self, tile, slot) -> None:
        """Put the tile's rows into the output of its block; those that saw no key stay as they are."""
        c, s = self.config, self.scratch
        token_row = self._token_row(LANES)
        of_tile = (token_row >= self.tiles.row_lo[tile]) & (token_row < self.tiles.row_hi[tile])

        def finish_head(head):
            state = self._load(head)
            mine = of_tile & (s.m[head] > softmax.MASKED)
            out = s.rows.out.at[slot, head]
            kept = out[...].astype(jnp.float32)
            keep = mine if c.out_lanes == LANES else jnp.broadcast_to(mine[:, :1], kept.shape)
            out[...] = jnp.where(keep, softmax.output(state), kept).astype(out.dtype)
            lse = s.lse.at[self._lse_rows(head)]
            lse[...] = jnp.where(mine, softmax.log_sum_exp(state), lse[...])

        def finish_heads(heads):
            for head in heads:
                finish_head(head)

        self._for_heads(finish_heads)

    def clear_output(self, slot) -> None:
        """Rows of no tile: zeros, and no log-sum-exp."""
        s = self.scratch
        s.rows.out[slot] = jnp.zeros(s.rows.out.shape[1:], s.rows.out.dtype)
        s.lse[...] = jnp.full_like(s.lse, -jnp.inf)

    def pack_lse(self, slot) -> None:
        """The block's log-sum-exp as a dense array, ready to leave."""
        self.scratch.rows.lse[slot] = softmax.pack_lanes(self.scratch.lse[...])

    def _attend_heads(self, q_slot, kv, mask=None, real=None) -> None:
        """Take the keys `kv` of all heads, of which rows see those of `mask`, and those not `real` may be anything."""
        c, s = self.config, self.scratch
        logits = softmax.Logits(scale=c.spec.resolved_scale(c.row.k_dim), soft_cap=c.spec.soft_cap)

        def score(head):
            k = kv[head, :, c.row.k_lanes].astype(c.compute_dtype)
            x = logits(softmax.score(s.rows.q[q_slot, head], k))
            return x if mask is None else jnp.where(mask, x, softmax.MASKED)

        def values(head):
            v = kv[head, :, c.row.v_lanes].astype(c.compute_dtype)
            return v if real is None else jnp.where(real, v, jnp.zeros_like(v))

        def absorb(head, x):
            self._store(head, softmax.absorb(self._load(head), x, values(head)))

        def attend_heads(heads):
            x = score(heads[0])
            for head, after in itertools.pairwise(heads):
                x_after = score(after)  # its products hide the latencies of this head's softmax
                absorb(head, x)
                x = x_after
            absorb(heads[-1], x)

        self._for_heads(attend_heads)

    def _for_heads(self, body) -> None:
        """Run `body` on lists of heads: several where a head has few rows, to hide one's latencies behind another's."""
        heads = self.config.kv_heads
        at_once = min(heads, HEADS_AT_ONCE) if self.config.rows < FEW_ROWS else 1
        groups = heads // at_once
        jax.lax.fori_loop(0, groups, lambda i, _: body([i * at_once + j for j in range(at_once)]), None)
        if heads % at_once:
            body(list(range(groups * at_once, heads)))

    def _load(self, head) -> softmax.State:
        s = self.scratch
        return softmax.State(s.m[head][:, :1], s.l[head][:, :1], s.acc[head])

    def _store(self, head, state: softmax.State) -> None:
        s = self.scratch
        s.m[head] = jnp.broadcast_to(state.m, s.m.shape[1:])
        s.l[head] = jnp.broadcast_to(state.l, s.l.shape[1:])
        s.acc[head] = state.acc

    def _positions(self, tile):
        """The tile's positions, as (first, one past the last)."""
        position = self.tiles.position[tile]
        return position + self.tiles.row_lo[tile], position + self.tiles.row_hi[tile]

    def _lse_rows(self, head):
        return pl.ds(pl.multiple_of(head * self.config.rows, SUBLANES), self.config.rows)

    def _token_row(self, columns: int) -> jax.Array:
        """The row of the block that each row of the operand stands for, `[rows, columns]`."""
        c = self.config
        if c.q_rows == 1:
            return jnp.zeros((c.rows, columns), jnp.int32)
        token_row = jax.lax.broadcasted_iota(jnp.int32, (c.group, c.q_rows, columns), 1)
        return token_row.reshape(c.rows, columns)
