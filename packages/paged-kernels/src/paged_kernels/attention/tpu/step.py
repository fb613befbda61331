"""What happens to one tile: its softmax state from the first block of keys to the rows of the output."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int32

from paged_kernels.attention.mask import fully_visible, in_tree, key_range, visible
from paged_kernels.attention.tpu import softmax
from paged_kernels.attention.tpu.config import Config, Memory
from paged_kernels.attention.tpu.copies import Cursor
from paged_kernels.attention.tpu.memory import Inputs, Scratch
from paged_kernels.attention.tpu.scales import spread_scales
from paged_kernels.attention.tpu.schedule import Tiles
from paged_kernels.attention.tpu.unpack import load_lanes, unit
from paged_kernels.mosaic import LANES, SUBLANES, cdiv

HEADS_AT_ONCE = 8
"""How many heads are attended side by side, each one's products beside the softmax of the one before."""
FEW_ROWS = 64
"""Heads with more rows go one by one in float32, whose products are six times the code."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keys:
    """Keys that are attended together, for all heads."""

    kv: Memory  # [kv_heads, pages, page_size, storage_lanes]
    scales: Memory  # [kinds, kv_heads, keys], or None
    distance: Float[Array, "rows keys"] | None
    """Positions between row and key, where there are ALiBi slopes."""
    mask: Bool[Array, "rows keys"] | None = None
    """Which keys each row sees, unless it sees all."""
    real: Bool[Array, "keys out_lanes"] | None = None
    """Which keys hold what some row may see; the others may be anything, and their values are not to be used."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """What happens to a tile's softmax state and to its rows of the output."""

    config: Config
    tiles: Tiles
    inputs: Inputs
    scratch: Scratch

    def reset(self) -> None:
        """The state before any key: a sink counts as a key that has been seen, with no value."""
        c, s = self.config, self.scratch
        s.acc[...] = jnp.zeros_like(s.acc)
        if not c.has_sinks:
            s.m[...] = jnp.full_like(s.m, softmax.MASKED)
            s.l[...] = jnp.zeros_like(s.l)
            return
        s.l[...] = jnp.full_like(s.l, 1 / LANES)  # 1 in all

        def reset_head(head, _):
            s.m[head] = self._by_row(self.inputs.sinks[head])

        jax.lax.fori_loop(0, c.kv_heads, reset_head, None)

    def sees_all(self, at: Cursor) -> jax.Array:
        """Whether every row of the tile sees every key of block `at`."""
        c, tiles = self.config, self.tiles
        first_key = at.page * c.page_size
        keys = (first_key, first_key + c.block_tokens)
        first_new = tiles.first_new[at.tile] if c.tree_words else None
        return fully_visible(c.spec, self._positions(at.tile), keys, tiles.kv_len[at.tile], first_new)

    def attend_whole(self, at: Cursor, q_slot, kv_slot) -> None:
        """Take a block of which every row sees every key."""
        c, s = self.config, self.scratch
        self._spread_scales(kv_slot)
        keys = Keys(
            kv=s.pages.kv.at[kv_slot],
            scales=s.scales.at[:, :, pl.ds(0, c.block_tokens)] if c.row.is_quantised else None,
            distance=self._distance(at.tile, at.page * c.page_size, c.block_tokens),
        )
        self._attend_heads(q_slot, keys)

    def attend_chunks(self, at: Cursor, pages, q_slot, kv_slot) -> None:
        """Take the first `pages` pages of block `at`, masked, in as few chunks as hold them."""
        c = self.config
        self._spread_scales(kv_slot)

        def attend_chunk(chunk, _):
            self._attend_heads(q_slot, self._masked_keys(at, chunk, q_slot, kv_slot))

        jax.lax.fori_loop(0, pl.cdiv(pages, c.chunk_pages), attend_chunk, None)

    def _masked_keys(self, at: Cursor, chunk, q_slot, kv_slot) -> Keys:
        """A chunk of block `at`."""
        c, s, tile, size = self.config, self.scratch, at.tile, self.config.chunk_tokens
        position, kv_len = self.tiles.position[tile], self.tiles.kv_len[tile]
        start = pl.multiple_of(chunk * size, size)
        first_key = at.page * c.page_size + start
        p = first_key + jax.lax.broadcasted_iota(jnp.int32, (c.rows, size), 1)
        tree = self._in_tree(tile, first_key, p, q_slot) if c.tree_words else None
        first, end = key_range(c.spec, *self._positions(tile), kv_len, tree=tree is not None)
        scales = None
        if c.row.is_quantised:
            scales = s.scales.at[:, :, pl.ds(start, size)]
            scales[...] = jnp.where((p[:1] >= first) & (p[:1] < end), scales[...], 0)
        at_rows = first_key + jax.lax.broadcasted_iota(jnp.int32, (size, c.out_lanes), 0)
        return Keys(
            kv=s.pages.kv.at[kv_slot, :, pl.ds(chunk * c.chunk_pages, c.chunk_pages)],
            scales=scales,
            distance=self._distance(tile, first_key, size),
            mask=visible(c.spec, position + self._token_row(size), p, kv_len, tree),
            real=(at_rows >= first) & (at_rows < end),
        )

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

    def _attend_heads(self, q_slot, keys: Keys) -> None:
        """Take the keys into the state of all heads."""

        def attend_heads(heads):
            x = self._score(heads[0], q_slot, keys)
            for head, after in itertools.pairwise(heads):
                x_after = self._score(after, q_slot, keys)  # its products hide the latencies of this head's softmax
                self._absorb(head, x, keys)
                x = x_after
            self._absorb(heads[-1], x, keys)

        self._for_heads(attend_heads)

    def _score(self, head, q_slot, keys: Keys) -> Float[Array, "rows keys"]:
        """The logits of a head, to base 2."""
        c = self.config
        x = softmax.score(self.scratch.rows.q[q_slot, head], load_lanes(keys.kv.at[head], c.row.k_lanes, c))
        if keys.scales is not None:
            x *= keys.scales[0, pl.ds(head, 1)]
        x = softmax.Logits(scale=c.spec.resolved_scale(c.row.k_dim), soft_cap=c.spec.soft_cap)(x)
        if keys.distance is not None:
            x -= self._by_row(self.inputs.slopes[head])[:, :1] * keys.distance
        return x if keys.mask is None else jnp.where(keys.mask, x, softmax.MASKED)

    def _absorb(self, head, x: Float[Array, "rows keys"], keys: Keys) -> None:
        """Take a head's logits and values into its state."""
        c = self.config
        v = load_lanes(keys.kv.at[head], c.row.v_lanes, c)
        v = v if keys.real is None else jnp.where(keys.real, v, jnp.zeros_like(v))
        scales = None if keys.scales is None else keys.scales[c.row.scales_per_row - 1, pl.ds(head, 1)]
        self._store(head, softmax.absorb(self._load(head), x, v, scales))

    def _spread_scales(self, kv_slot) -> None:
        """Put the scales of a block, if it has any, where the keys of a head find theirs in a row."""
        c, s = self.config, self.scratch
        if not c.row.is_quantised:
            return
        pages = s.pages.scales.at[kv_slot]

        def store(kind, first, scales):
            s.scales[kind, :, pl.ds(first, scales.shape[1])] = scales * unit(c)

        kinds = c.row.scales_per_row
        spread_scales(lambda i: pages[i], store, pages=c.kv_pages, page_size=c.page_size, kinds=kinds)

    def _for_heads(self, body) -> None:
        """Run `body` on lists of heads, several at once, to hide one's latencies behind another's."""
        c, heads = self.config, self.config.kv_heads
        one_by_one = c.compute_dtype == jnp.float32 and c.rows >= FEW_ROWS
        at_once = 1 if one_by_one else min(heads, HEADS_AT_ONCE)
        groups = heads // at_once
        jax.lax.fori_loop(0, groups, lambda i, _: body([i * at_once + j for j in range(at_once)]), None)
        if heads % at_once:
            body(list(range(groups * at_once, heads)))

    def _load(self, head) -> softmax.State:
        s = self.scratch
        return softmax.State(s.m[head], s.l[head], s.acc[head])

    def _store(self, head, state: softmax.State) -> None:
        s = self.scratch
        s.m[head], s.l[head], s.acc[head] = state

    def _positions(self, tile):
        """The tile's positions, as (first, one past the last)."""
        position = self.tiles.position[tile]
        return position + self.tiles.row_lo[tile], position + self.tiles.row_hi[tile]

    def _distance(self, tile, first_key, keys: int) -> Float[Array, "rows keys"] | None:
        """Positions between each row and each of some keys."""
        c = self.config
        if not c.has_alibi:
            return None
        p = first_key + jax.lax.broadcasted_iota(jnp.int32, (c.rows, keys), 1)
        return jnp.abs(self.tiles.position[tile] + self._token_row(keys) - p).astype(jnp.float32)

    def _in_tree(self, tile, first_key, p: Int32[Array, "rows keys"], q_slot) -> Bool[Array, "rows keys"]:
        """Whether the rows' tree masks show them the keys of a chunk, which fall into a few words."""
        c, first_new = self.config, self.tiles.first_new[tile]
        words, count = self.scratch.rows.tree[q_slot], cdiv(c.chunk_tokens, 32) + 1
        skip, in_words = 0, p - first_new < 32 * c.tree_words
        if c.tree_words > count:
            skip = jnp.clip((first_key - first_new) // 32, 0, c.tree_words)
            words = pltpu.roll(words, words.shape[1] - skip, axis=1)
        words = self._by_token(words)
        columns = [words[:, i : i + 1] for i in range(min(count, c.tree_words))]
        return in_words & in_tree(columns, first_new + 32 * skip, p)

    def _by_token(self, x: Int32[Array, "q_rows lanes"]) -> Int32[Array, "rows lanes"]:
        """What each row of the block brings, for the rows of the operand."""
        c = self.config
        if c.q_rows == 1:
            return jnp.broadcast_to(x, (c.rows, x.shape[1]))
        return jnp.broadcast_to(x[None], (c.group, *x.shape)).reshape(c.rows, -1)

    def _by_row(self, x: Float[Array, "group_rows lanes"]) -> Float[Array, "rows lanes"]:
        """What each query head of a group brings, for the rows of the operand."""
        c = self.config
        if c.q_rows == 1:
            return x
        return jnp.broadcast_to(x[: c.group, None], (c.group, c.q_rows, x.shape[1])).reshape(c.rows, -1)

    def _lse_rows(self, head):
        return pl.ds(pl.multiple_of(head * self.config.rows, SUBLANES), self.config.rows)

    def _token_row(self, columns: int) -> Int32[Array, "rows columns"]:
        """The row of the block that each row of the operand stands for."""
        c = self.config
        if c.q_rows == 1:
            return jnp.zeros((c.rows, columns), jnp.int32)
        token_row = jax.lax.broadcasted_iota(jnp.int32, (c.group, c.q_rows, columns), 1)
        return token_row.reshape(c.rows, columns)
