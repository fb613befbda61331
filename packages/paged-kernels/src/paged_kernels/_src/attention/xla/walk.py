"""The walk: each tile of rows loops over its own blocks of pages (docs/kernels/xla.md)."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from paged_kernels._src.attention.mask import in_tree, visible
from paged_kernels._src.attention.xla.prepare import TreeRows, WalkConfig, WalkWork, pad_rows
from paged_kernels._src.attention.xla.softmax import SoftmaxState, logits
from paged_kernels._src.attention.xla.work_list import WorkList
from paged_kernels._src.batch import RaggedBatch
from paged_kernels._src.head_params import HeadParams
from paged_kernels._src.kv_pages import KVPages
from paged_kernels._src.spec import AttentionSpec

Output = Float[Array, "tokens q_heads v_head_dim"]
LogSumExp = Float[Array, "tokens q_heads"]


def attend(
    q: Float[Array, "tokens q_heads head_dim"],
    pages: KVPages,
    batch: RaggedBatch,
    work: WalkWork,
    head_params: HeadParams,
    *,
    config: WalkConfig,
    return_lse: bool,
) -> tuple[Output, LogSumExp | None]:
    """Returns the output in `q.dtype` and, if `return_lse`, the log of each row's softmax denominator in float32.

    Rows that are not tokens get 0 and -inf. Single-row sequences are walked in tiles of one row, the others in tiles of
    `config.q_rows`. The number of iterations depends on the data: one compilation serves all lengths, and a call costs
    what its own lengths cost.
    """
    q = pad_rows(q, config)
    results = [jnp.zeros((*q.shape[:2], pages.v_head_dim), q.dtype)]
    if return_lse:
        results.append(jnp.full(q.shape[:2], -jnp.inf, jnp.float32))
    for q_rows, (work_list, count) in zip(config.tile_rows, work.lists, strict=True):
        walk = Walk(q, pages, batch, head_params, config=config, tree=work.tree, q_rows=q_rows, return_lse=return_lse)
        results = walk.fill(results, work_list, count)
    out, *lse = (rows[: config.tokens] for rows in results)
    return out, lse[0] if lse else None


@dataclasses.dataclass(frozen=True)
class Walk:
    """One loop over all tiles of `q_rows` rows; each tile loops over blocks of `config.kv_pages` pages."""

    q: Float[Array, "padded_tokens q_heads head_dim"]
    pages: KVPages
    batch: RaggedBatch
    head_params: HeadParams
    _: dataclasses.KW_ONLY
    config: WalkConfig
    tree: TreeRows | None
    q_rows: int
    return_lse: bool

    @property
    def spec(self) -> AttentionSpec:
        """The attention to compute."""
        return self.config.spec

    @property
    def q_per_kv(self) -> int:
        """Query heads per KV head."""
        return self.q.shape[1] // self.pages.num_kv_heads

    def fill(self, results: list[Array], work: WorkList, count: Int32[Array, ""]) -> list[Array]:
        """Returns `results`, the padded output and maybe log-sum-exp, with the rows of `count` tiles filled in."""

        def fill_tile(index, results):
            tile = work[index]
            return jax.tree.map(lambda whole, part: self.put_rows(whole, tile, part), results, self.attend(tile))

        return jax.lax.fori_loop(0, count, fill_tile, results)

    def attend(self, tile: WorkList) -> list[Float[Array, "kv_heads rows ..."]]:
        """Returns the output and, if `return_lse`, the log-sum-exp of the tile's rows, in float32."""
        page_size = self.pages.page_size
        q = self.take_rows(tile)
        t = tile.position + jnp.arange(self.q_rows, dtype=jnp.int32)[:, None]

        def attend_block(block, state):
            first_page = tile.first_page + block * self.config.kv_pages
            p = first_page * page_size + jnp.arange(self.config.kv_pages * page_size, dtype=jnp.int32)[None]
            sees = self.is_token(t) & visible(self.spec, t, p, tile.kv_end, self.in_tree(tile, p))  # [rows, keys]
            k, v = self.fetch(tile, first_page)
            s = logits(q, k, self.spec.soft_cap) + self.bias(t, p)
            s = jnp.where(jnp.repeat(sees, self.q_per_kv, axis=0), s, -jnp.inf)
            # A slot that no row may read can hold NaN, and 0 * NaN is NaN.
            return state.add_keys(s, jnp.where(sees.any(axis=0)[:, None], v, 0))

        start = SoftmaxState.initial(self.sinks(t), self.pages.v_head_dim)
        blocks = tile.num_blocks(page_size, self.config.kv_pages)
        end = jax.lax.fori_loop(0, blocks, attend_block, start)
        return [end.output(), end.lse()] if self.return_lse else [end.output()]

    def fetch(
        self, tile: WorkList, first_page: Int32[Array, ""]
    ) -> tuple[Float[Array, "kv_heads keys head_dim"], Float[Array, "kv_heads keys v_head_dim"]]:
        """Returns K and V of a block of pages, in float32. Past the tile's last page, that page is repeated."""
        index = first_page + jnp.arange(self.config.kv_pages, dtype=jnp.int32)
        index = jnp.minimum(index, tile.end_page(self.pages.page_size) - 1)
        k, v = take_float32(self.pages, self.batch.page_table[tile.seq, index])
        return _by_head(k), _by_head(v)

    def is_token(self, t: Int32[Array, "q_rows 1"]) -> Bool[Array, "q_rows 1"]:
        """False for rows before position 0 of their sequence."""
        return jnp.ones_like(t, bool) if self.batch.q_starts is not None else t >= 0

    def in_tree(self, tile: WorkList, p: Int32[Array, "1 keys"]) -> Bool[Array, "q_rows keys"] | None:
        """True where the tree mask shows a row a key; None without a tree mask."""
        if self.tree is None:
            return None
        rows = jax.lax.dynamic_slice_in_dim(self.tree.words, tile.first_row, self.q_rows)
        words = [rows[:, index : index + 1] for index in range(rows.shape[1])]
        return in_tree(words, self.tree.first_new[tile.seq], p)

    def bias(
        self, t: Int32[Array, "q_rows 1"], p: Int32[Array, "1 keys"]
    ) -> Float[Array, "kv_heads rows keys"] | Literal[0]:
        """What ALiBi adds to the logits."""
        if self.head_params.alibi_slopes is None:
            return 0
        slopes = jnp.tile(self.of_kv_heads(self.head_params.alibi_slopes), self.q_rows)  # [kv_heads, rows]
        distance = jnp.repeat(jnp.abs(t - p), self.q_per_kv, axis=0).astype(jnp.float32)  # [rows, keys]
        return -slopes[..., None] * distance[None]

    def sinks(self, t: Int32[Array, "q_rows 1"]) -> Float[Array, "kv_heads rows"]:
        """The sink of each row; -inf for none."""
        kv_heads = self.pages.num_kv_heads
        if self.head_params.sinks is None:
            return jnp.full((kv_heads, self.q_rows * self.q_per_kv), -jnp.inf, jnp.float32)
        sinks = jnp.where(
            self.is_token(t), self.of_kv_heads(self.head_params.sinks)[:, None], -jnp.inf
        )  # [kv_heads, q_rows, q_per_kv]
        return sinks.reshape(kv_heads, -1)

    def of_kv_heads(self, per_q_head: Float[Array, " q_heads"]) -> Float[Array, "kv_heads q_per_kv"]:
        """Reshapes one value per query head to `[kv_heads, q_per_kv]`, in float32."""
        return per_q_head.astype(jnp.float32).reshape(self.pages.num_kv_heads, self.q_per_kv)

    def take_rows(self, tile: WorkList) -> Float[Array, "kv_heads rows head_dim"]:
        """Returns the tile's rows of q times the softmax scale, in float32.

        Each KV head has `q_rows * q_per_kv` rows, in the order `row * q_per_kv + head`.
        """
        head_dim = self.q.shape[2]
        rows = jax.lax.dynamic_slice_in_dim(self.q, tile.first_row, self.q_rows).astype(jnp.float32)
        rows = (
            rows.reshape(self.q_rows, -1, self.q_per_kv, head_dim)
            .swapaxes(0, 1)
            .reshape(-1, self.q_rows * self.q_per_kv, head_dim)
        )
        return rows * self.spec.resolved_scale(head_dim)

    def put_rows(self, whole: Array, tile: WorkList, part: Array) -> Array:
        """Returns `whole [padded_tokens, q_heads, ...]` with the tile's rows from `part [kv_heads, rows, ...]`."""
        rest = part.shape[2:]
        part = part.reshape(-1, self.q_rows, self.q_per_kv, *rest).swapaxes(0, 1).reshape(self.q_rows, -1, *rest)
        before = jax.lax.dynamic_slice_in_dim(whole, tile.first_row, self.q_rows)
        is_tiles = jnp.arange(self.q_rows, dtype=jnp.int32).reshape(-1, *[1] * (part.ndim - 1)) < tile.num_rows
        rows = jnp.where(is_tiles, part.astype(whole.dtype), before)
        return jax.lax.dynamic_update_slice_in_dim(whole, rows, tile.first_row, 0)


def take_float32(
    pages: KVPages, page_ids: Int32[Array, " ids"]
) -> tuple[Float[Array, "ids kv_heads page_size head_dim"], Float[Array, "ids kv_heads page_size v_head_dim"]]:
    """Returns K and V of these pages in float32. Time and memory depend on `page_ids` alone.

    XLA's CPU backend has no bfloat16 gather: it converts all pages to float32, outside of the loop. So types other than
    float32 are gathered as bits. The barrier keeps the conversion inside the loop, where it fuses with the gather.
    """
    pages, page_ids = jax.lax.optimization_barrier((pages, page_ids))
    rows, scales = jax.tree.map(_as_bits, pages).take(page_ids)
    k, v = pages.layout.unpack(_from_bits(rows, pages.layout.storage_dtype), scales)
    return k.astype(jnp.float32), v.astype(jnp.float32)


def _by_head(of_pages: Float[Array, "ids kv_heads page_size dim"]) -> Float[Array, "kv_heads keys dim"]:
    return of_pages.swapaxes(0, 1).reshape(of_pages.shape[1], -1, of_pages.shape[3])


def _as_bits(data: Array) -> Array:
    if data.dtype.itemsize > 2 or data.dtype == jnp.int8:
        return data
    return jax.lax.bitcast_convert_type(data, f"uint{8 * data.dtype.itemsize}")


def _from_bits(data: Array, dtype: np.dtype) -> Array:
    if dtype == jnp.bfloat16:  # the upper half of a float32's bits
        return jax.lax.bitcast_convert_type(data.astype(jnp.uint32) << 16, jnp.float32)
    return data if data.dtype == dtype else jax.lax.bitcast_convert_type(data, dtype)
