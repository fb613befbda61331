"""What happens to one tile: from the first block of keys to its rows of the output."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int32

from paged_kernels._src.attention.mask import fully_visible, in_tree, key_range, visible
from paged_kernels._src.attention.tpu import softmax
from paged_kernels._src.attention.tpu.config import PARTS_AT_ONCE, Config, Memory
from paged_kernels._src.attention.tpu.copies import Cursor, RowStream
from paged_kernels._src.attention.tpu.memory import KernelInputs, Scratch
from paged_kernels._src.attention.tpu.scales import spread_scales
from paged_kernels._src.attention.tpu.schedule import Tiles
from paged_kernels._src.attention.tpu.unpack import load_lanes, unit
from paged_kernels._src.integers import cdiv
from paged_kernels._src.tpu.registers import LANES, SUBLANES

FEW_ROWS = 64
"""In float32, parts with at least this many rows are computed one by one: each product is six times the code."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keys:
    """Keys that are attended together, for all heads."""

    kv: Memory  # [kv_heads, pages, page_size, storage_lanes]
    scales: Memory  # [kinds, kv_heads, keys], or None
    distance: Float[Array, "rows keys"] | None
    """The distance in positions between row and key; `None` without ALiBi."""
    mask: Bool[Array, "rows keys"] | None = None
    """True where a row sees a key; `None` if every row sees every key."""
    in_range: Bool[Array, "keys out_lanes"] | None = None
    """True for keys that some row may see. Other places hold arbitrary data, and their values must not be used."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TileAttention:
    """What happens to the softmax state of a tile, and to its rows of the output."""

    config: Config
    tiles: Tiles
    inputs: KernelInputs
    scratch: Scratch

    def for_row_blocks(self, rows: RowStream, attend: Callable[..., Any], begin: Callable[[], Any]) -> None:
        """Run `carry = attend(block, buffer, carry)` for each block of rows, with its copies in and out.

        `begin()` returns the first carry.
        """

        def attend_rows(block, carry):
            buffer = block % 2
            rows.start_q(block + 1)
            rows.wait_out(block - 2)
            rows.wait_q(block)
            carry = attend(block, buffer, carry)
            self.pack_lse(buffer)
            rows.start_out(block)
            return carry

        blocks = self.config.q_blocks
        rows.start_q(0)
        jax.lax.fori_loop(0, blocks, attend_rows, begin())
        rows.wait_out(blocks - 2)
        rows.wait_out(blocks - 1)

    def reset(self) -> None:
        """Set the state of all parts to the state before any key."""
        jax.lax.fori_loop(0, self.config.parts, lambda part, _: self.store(part, self.initial(part)), None)

    def initial(self, part) -> softmax.State:
        """The state of a part before any key. A sink counts as a seen key without a value."""
        c = self.config
        column, acc = jnp.zeros((c.part_rows, LANES), jnp.float32), jnp.zeros((c.part_rows, c.out_lanes), jnp.float32)
        if not c.has_sinks:
            return softmax.State(column + softmax.MASKED, column, acc)
        return softmax.State(
            self._expand_heads(self.inputs.sinks[part]), column + 1 / LANES, acc
        )  # lanes of l sum to 1

    def sees_all(self, at: Cursor) -> jax.Array:
        """True if every row of the tile sees every key of block `at`."""
        c, tiles = self.config, self.tiles
        first_key = at.page * c.page_size
        keys = (first_key, first_key + c.block_tokens)
        first_new = tiles.first_new[at.tile] if c.tree_words else None
        return fully_visible(c.spec, self._positions(at.tile), keys, tiles.kv_len[at.tile], first_new)

    def attend_whole(self, at: Cursor, q_buffer, kv_buffer) -> None:
        """Attend a block in which every row sees every key."""
        self._attend_parts(q_buffer, self.whole_keys(at, kv_buffer))

    def whole_keys(self, at: Cursor, kv_buffer) -> Keys:
        """The keys of a buffer that holds a block in which every row sees every key."""
        c, s = self.config, self.scratch
        self.spread_scales(kv_buffer)
        return Keys(
            kv=s.pages.kv.at[kv_buffer],
            scales=s.scales.at[:, :, pl.ds(0, c.block_tokens)] if c.layout.is_quantised else None,
            distance=self._distance(at.tile, at.page * c.page_size, c.block_tokens),
        )

    def attend_subblocks(self, at: Cursor, pages, q_buffer, kv_buffer) -> None:
        """Attend the first `pages` pages of block `at`, masked, one sub-block at a time."""
        c = self.config
        self.spread_scales(kv_buffer)

        def attend_subblock(subblock, _):
            first_page = at.page + subblock * c.subblock_pages
            self._attend_parts(q_buffer, self.masked_keys(at.tile, first_page, subblock, q_buffer, kv_buffer))

        jax.lax.fori_loop(0, pl.cdiv(pages, c.subblock_pages), attend_subblock, None)

    def masked_keys(self, tile, first_page, subblock, q_buffer, kv_buffer) -> Keys:
        """The keys of one sub-block of a buffer, which begins with page `first_page` of the tile's sequence."""
        c, s, size = self.config, self.scratch, self.config.subblock_tokens
        position, kv_len = self._first_position(tile), self.tiles.kv_len[tile]
        start, first_key = pl.multiple_of(subblock * size, size), first_page * c.page_size
        p = first_key + jax.lax.broadcasted_iota(jnp.int32, (c.part_rows, size), 1)
        tree = self._in_tree(tile, first_key, p, q_buffer) if c.tree_words else None
        first, end = self.keys_of_tile(tile)
        scales = None
        if c.layout.is_quantised:
            scales = s.scales.at[:, :, pl.ds(start, size)]
            scales[...] = jnp.where((p[:1] >= first) & (p[:1] < end), scales[...], 0)
        at_rows = first_key + jax.lax.broadcasted_iota(jnp.int32, (size, c.out_lanes), 0)
        return Keys(
            kv=s.pages.kv.at[kv_buffer, :, pl.ds(subblock * c.subblock_pages, c.subblock_pages)],
            scales=scales,
            distance=self._distance(tile, first_key, size),
            mask=visible(c.spec, position + self._token_row(size), p, kv_len, tree),
            in_range=None if c.clears_unseen else (at_rows >= first) & (at_rows < end),
        )

    def fills_block(self, tile) -> jax.Array:
        """True if the tile has every row of its block."""
        return (self.tiles.row_lo[tile] == 0) & (self.tiles.row_hi[tile] == self.config.q_rows)

    def finish(self, tile, buffer) -> None:
        """Write this tile's rows to the output, and reset the state. Rows with no visible key get 0 and -inf."""
        token_row = self._token_row(LANES)
        of_tile = (token_row >= self.tiles.row_lo[tile]) & (token_row < self.tiles.row_hi[tile])
        fills = self.fills_block(tile)
        pl.when(fills)(lambda: self._finish_parts(buffer, None))
        pl.when(jnp.logical_not(fills))(lambda: self._finish_parts(buffer, of_tile))

    def _finish_parts(self, buffer, of_tile: Bool[Array, "rows 128"] | None) -> None:
        def finish_parts(parts):
            for part in parts:
                self._finish_part(part, buffer, of_tile)

        self.for_parts(finish_parts)

    def _finish_part(self, part, buffer, of_tile: Bool[Array, "rows 128"] | None) -> None:
        """Write a part's rows: those of the tile, or all of them if `of_tile` is None."""
        c, s, state = self.config, self.scratch, self.load(part)
        self.store(part, self.initial(part))
        out, mine, kept = s.rows.out.at[buffer, part], state.m > softmax.MASKED, 0
        if of_tile is not None:
            mine, kept = mine & of_tile, out[...].astype(jnp.float32)
        wide = jnp.concatenate([mine] * (c.out_lanes // LANES), axis=1)
        out[...] = jnp.where(wide, softmax.output(state), kept).astype(out.dtype)
        if c.has_lse:
            lse = s.lse.at[self._lse_rows(part)]
            lse[...] = jnp.where(mine, softmax.log_sum_exp(state), -jnp.inf if of_tile is None else lse[...])

    def clear_output(self, buffer) -> None:
        """Fill the block's output with 0 and its log-sum-exp with -inf."""
        c, s = self.config, self.scratch
        out = s.rows.out.at[pl.ds(buffer * c.operands, c.operands)]
        out[...] = jnp.zeros_like(out)
        if c.has_lse:
            s.lse[...] = jnp.full_like(s.lse, -jnp.inf)

    def pack_lse(self, buffer) -> None:
        """Pack the block's log-sum-exp into a dense array, ready to copy out."""
        if self.config.has_lse:
            self.scratch.rows.lse[buffer] = softmax.pack_lanes(self.scratch.lse[: self.config.lse_rows])

    def _attend_parts(self, q_buffer, keys: Keys) -> None:
        """Add the keys to the state of all parts."""

        def attend_parts(parts):
            x = self.score(parts[0], q_buffer, keys)
            for part, after in itertools.pairwise(parts):
                x_after = self.score(after, q_buffer, keys)  # its products hide the latency of this part's softmax
                self.store(part, self.add_keys(self.load(part), part, x, keys))
                x = x_after
            self.store(parts[-1], self.add_keys(self.load(parts[-1]), parts[-1], x, keys))

        self.for_parts(attend_parts)

    def score(self, part, q_buffer, keys: Keys) -> Float[Array, "rows keys"]:
        """Returns the logits of a part, to base 2."""
        c, head = self.config, part // self.config.splits
        x = softmax.score(self.scratch.rows.q[q_buffer, part], load_lanes(keys.kv.at[head], c.layout.k_lanes, c))
        if keys.scales is not None:
            x *= keys.scales[0, pl.ds(head, 1)]
        x = softmax.Logits(scale=c.spec.resolved_scale(c.layout.k_dim), soft_cap=c.spec.soft_cap)(x)
        if keys.distance is not None:
            x -= self._expand_heads(self.inputs.slopes[part])[:, :1] * keys.distance
        return x if keys.mask is None else jnp.where(keys.mask, x, softmax.MASKED)

    def add_keys(self, state: softmax.State, part, x: Float[Array, "rows keys"], keys: Keys) -> softmax.State:
        """Returns the state after a part's logits and values."""
        c, head = self.config, part // self.config.splits
        v = load_lanes(keys.kv.at[head], c.layout.v_lanes, c)
        v = v if keys.in_range is None else jnp.where(keys.in_range, v, jnp.zeros_like(v))
        scales = None if keys.scales is None else keys.scales[c.layout.scales_per_entry - 1, pl.ds(head, 1)]
        return softmax.add_keys(state, x, v, scales)

    def spread_scales(self, kv_buffer) -> None:
        """Put the scales of a block side by side in the order of its keys. Does nothing without scales."""
        c, s = self.config, self.scratch
        if not c.layout.is_quantised:
            return
        pages = s.pages.scales.at[kv_buffer]

        def store(kind, first, scales):
            s.scales[kind, :, pl.ds(first, scales.shape[1])] = scales * unit(c)

        kinds = c.layout.scales_per_entry
        spread_scales(lambda i: pages[i], store, pages=c.kv_pages, page_size=c.page_size, kinds=kinds)

    def for_parts(self, body) -> None:
        """Run `body` on lists of parts. The parts of a list hide each other's latency."""
        c, parts = self.config, self.config.parts
        one_by_one = c.compute_dtype == jnp.float32 and c.part_rows >= FEW_ROWS
        at_once = 1 if one_by_one else min(parts, PARTS_AT_ONCE)
        looped = parts // at_once * at_once if parts >= 2 * at_once else 0  # one list needs no loop
        if looped:
            jax.lax.fori_loop(0, looped // at_once, lambda i, _: body([i * at_once + j for j in range(at_once)]), None)
        for first in range(looped, parts, at_once):
            body(list(range(first, min(first + at_once, parts))))

    def load(self, part) -> softmax.State:
        """Returns the state of a part."""
        s = self.scratch
        return softmax.State(s.m[part], s.l[part], s.acc[part])

    def store(self, part, state: softmax.State) -> None:
        """Store the state of a part."""
        s = self.scratch
        s.m[part], s.l[part], s.acc[part] = state

    def keys_of_tile(self, tile):
        """The positions of the keys that some row of the tile may see, as (first, one past the last)."""
        c = self.config
        return key_range(c.spec, *self._positions(tile), self.tiles.kv_len[tile], tree=c.tree_words > 0)

    def _first_position(self, tile):
        """The position of the first row of the tile's operand."""
        tiles = self.tiles
        return tiles.position[tile] + tiles.row_lo[tile] if self.config.decode else tiles.position[tile]

    def _positions(self, tile):
        """The positions of the tile's rows, as (first, one past the last)."""
        position = self.tiles.position[tile]
        return position + self.tiles.row_lo[tile], position + self.tiles.row_hi[tile]

    def _distance(self, tile, first_key, keys: int) -> Float[Array, "rows keys"] | None:
        """Returns the distance in positions between each row and each of `keys` keys."""
        c = self.config
        if not c.has_alibi:
            return None
        p = first_key + jax.lax.broadcasted_iota(jnp.int32, (c.part_rows, keys), 1)
        return jnp.abs(self._first_position(tile) + self._token_row(keys) - p).astype(jnp.float32)

    def _in_tree(self, tile, first_key, p: Int32[Array, "rows keys"], q_buffer) -> Bool[Array, "rows keys"]:
        """True where the tree mask shows a row a key of a sub-block. Such keys lie in a few words."""
        c, first_new = self.config, self.tiles.first_new[tile]
        words, count = self.scratch.rows.tree[q_buffer], cdiv(c.subblock_tokens, 32) + 1
        skip, in_words = 0, p - first_new < 32 * c.tree_words
        if c.tree_words > count:
            skip = jnp.clip((first_key - first_new) // 32, 0, c.tree_words)
            words = pltpu.roll(words, words.shape[1] - skip, axis=1)
        words = self._expand_tokens(words)
        columns = [words[:, i : i + 1] for i in range(min(count, c.tree_words))]
        return in_words & in_tree(columns, first_new + 32 * skip, p)

    def _expand_tokens(self, x: Int32[Array, "q_rows lanes"]) -> Int32[Array, "rows lanes"]:
        """Expands one row per token to the rows of the operand."""
        c = self.config
        if c.operand_tokens == 1:
            return jnp.broadcast_to(x, (c.part_rows, x.shape[1]))
        return jnp.broadcast_to(x[None], (c.part_heads, *x.shape)).reshape(c.part_rows, -1)

    def _expand_heads(self, x: Float[Array, "head_rows lanes"]) -> Float[Array, "rows lanes"]:
        """Expands one row per query head of the part to the rows of the operand."""
        c = self.config
        if c.operand_tokens == 1:
            return x
        return jnp.broadcast_to(x[: c.part_heads, None], (c.part_heads, c.operand_tokens, x.shape[1])).reshape(
            c.part_rows, -1
        )

    def _lse_rows(self, part):
        return pl.ds(pl.multiple_of(part * self.config.part_rows, SUBLANES), self.config.part_rows)

    def _token_row(self, columns: int) -> Int32[Array, "rows columns"]:
        """The row of the block for each row of the operand."""
        c = self.config
        if c.operand_tokens == 1:
            return jnp.zeros((c.part_rows, columns), jnp.int32)
        token_row = jax.lax.broadcasted_iota(jnp.int32, (c.part_heads, c.operand_tokens, columns), 1)
        return token_row.reshape(c.part_rows, columns)
