"""The kernel's body: three loops, over blocks of query rows, their tiles, and each tile's blocks of pages."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paged_kernels.attention.mask import fully_visible, visible
from paged_kernels.attention.tpu import softmax
from paged_kernels.attention.tpu.config import Config, Memory
from paged_kernels.attention.tpu.copies import Cursor, PageBuffers, PageStream, RowBuffers, RowStream
from paged_kernels.attention.tpu.schedule import Tiles
from paged_kernels.mosaic import LANES, SUBLANES

FEW_ROWS = 64
HEADS_AT_ONCE = 8
"""Where a head has few rows, so many heads are attended side by side, to hide one's latencies behind another's."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Scratch:
    """The kernel's memory. `m`, `l` and `acc` are the softmax state, `m`, `l` and `lse` repeated along lanes."""

    pages: PageBuffers
    rows: RowBuffers
    m: Memory  # [kv_heads, rows, 128]
    l: Memory  # [kv_heads, rows, 128]  # noqa: E741
    acc: Memory  # [kv_heads, rows, lanes]
    lse: Memory  # [lse_rows, 128]

    @classmethod
    def shapes(cls, c: Config) -> "Scratch":
        """What to allocate."""
        return cls(
            pages=PageBuffers.shapes(c),
            rows=RowBuffers.shapes(c),
            m=pltpu.VMEM((c.kv_heads, c.rows, LANES), jnp.float32),
            l=pltpu.VMEM((c.kv_heads, c.rows, LANES), jnp.float32),
            acc=pltpu.VMEM((c.kv_heads, c.rows, c.lanes), jnp.float32),
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
        ahead = stream.start(ahead)
        stream.wait(at)
        step.attend(at, slot, stream.slot(at))
        return stream.advance(at), ahead

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

    def attend(self, at: Cursor, q_slot, kv_slot) -> None:
        """Take the keys of block `at` into the state; keys are masked only where some row does not see all."""
        c, tiles, tile = self.config, self.tiles, at.tile
        position, kv_len = tiles.position[tile], tiles.kv_len[tile]
        first_key = at.page * c.page_size
        queries = (position + tiles.row_lo[tile], position + tiles.row_hi[tile])
        all_visible = fully_visible(c.spec, queries, (first_key, first_key + c.block_tokens), kv_len)

        @pl.when(all_visible)
        def _():
            self._attend_heads(q_slot, kv_slot, None)

        @pl.when(jnp.logical_not(all_visible))
        def _():
            shape = (c.rows, c.block_tokens)
            p = first_key + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
            self._attend_heads(q_slot, kv_slot, visible(c.spec, position + self._token_row(c.block_tokens), p, kv_len))

    def finish(self, tile, slot) -> None:
        """Put the tile's rows into the output of its block."""
        c, s = self.config, self.scratch
        token_row = self._token_row(LANES)
        mine = (token_row >= self.tiles.row_lo[tile]) & (token_row < self.tiles.row_hi[tile])

        def finish_head(head, _):
            state = self._load(head)
            out = s.rows.out.at[slot, head]
            kept = out[...].astype(jnp.float32)
            keep = mine if c.lanes == LANES else jnp.broadcast_to(mine[:, :1], kept.shape)
            out[...] = jnp.where(keep, softmax.output(state), kept).astype(out.dtype)
            lse = s.lse.at[self._lse_rows(head)]
            lse[...] = jnp.where(mine, softmax.log_sum_exp(state), lse[...])

        self._for_heads(finish_head)

    def clear_output(self, slot) -> None:
        """Rows of no tile: zeros, and no log-sum-exp."""
        s = self.scratch
        s.rows.out[slot] = jnp.zeros(s.rows.out.shape[1:], s.rows.out.dtype)
        s.lse[...] = jnp.full_like(s.lse, -jnp.inf)

    def pack_lse(self, slot) -> None:
        """The block's log-sum-exp as a dense array, ready to leave."""
        self.scratch.rows.lse[slot] = softmax.pack_lanes(self.scratch.lse[...])

    def _attend_heads(self, q_slot, kv_slot, mask) -> None:
        c, s = self.config, self.scratch
        logits = softmax.Logits(scale=c.spec.resolved_scale(c.head_dim), soft_cap=c.spec.soft_cap)

        def attend_head(head, _):
            q = s.rows.q[q_slot, head]
            kv = s.pages.kv[kv_slot, head].astype(c.compute_dtype)
            k, v = (kv, kv) if c.shares_lanes else (kv[:, : c.head_dim], kv[:, c.head_dim :])
            self._store(head, softmax.attend(self._load(head), q, k, v, mask=mask, logits=logits))

        self._for_heads(attend_head)

    def _for_heads(self, body) -> None:
        unroll = min(self.config.kv_heads, HEADS_AT_ONCE) if self.config.rows < FEW_ROWS else 1
        jax.lax.fori_loop(0, self.config.kv_heads, body, None, unroll=unroll)

    def _load(self, head) -> softmax.State:
        s = self.scratch
        return softmax.State(s.m[head][:, :1], s.l[head][:, :1], s.acc[head])

    def _store(self, head, state: softmax.State) -> None:
        s = self.scratch
        s.m[head] = jnp.broadcast_to(state.m, s.m.shape[1:])
        s.l[head] = jnp.broadcast_to(state.l, s.l.shape[1:])
        s.acc[head] = state.acc

    def _lse_rows(self, head):
        return pl.ds(pl.multiple_of(head * self.config.rows, SUBLANES), self.config.rows)

    def _token_row(self, columns: int) -> jax.Array:
        """The row of the block that each row of the operand stands for, `[rows, columns]`."""
        c = self.config
        if c.q_rows == 1:
            return jnp.zeros((c.rows, columns), jnp.int32)
        token_row = jax.lax.broadcasted_iota(jnp.int32, (c.group, c.q_rows, columns), 1)
        return token_row.reshape(c.rows, columns)
