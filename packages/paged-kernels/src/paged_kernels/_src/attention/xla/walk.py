"""The walk: each tile of rows loops over its own blocks of pages (docs/kernels/xla.md)."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from paged_kernels._src.attention.block_sizes import BlockSizes
from paged_kernels._src.attention.mask import in_tree, visible
from paged_kernels._src.attention.xla.softmax import SoftmaxState, logits
from paged_kernels._src.attention.xla.work_list import WorkList, make_work_list
from paged_kernels._src.batch import RaggedBatch
from paged_kernels._src.head_params import HeadParams
from paged_kernels._src.kv_pages import KVPages
from paged_kernels._src.spec import AttentionSpec

DEFAULT_Q_ROWS = 64
DEFAULT_KEYS = 256
MOST_BLOCK_BYTES = 2 * 2**20

Output = Float[Array, "tokens q_heads v_head_dim"]
LogSumExp = Float[Array, "tokens q_heads"]


def paged_attention_xla(
    q: Float[Array, "tokens q_heads head_dim"],
    pages: KVPages,
    batch: RaggedBatch,
    spec: AttentionSpec,
    head_params: HeadParams,
    *,
    block_sizes: BlockSizes | None,
) -> tuple[Output, LogSumExp]:
    """Returns the output in `q.dtype`, and the log of each row's softmax denominator in float32.

    Rows that are not tokens get 0 and -inf. Single-row sequences are walked in tiles of one row, the others in tiles of
    `block_sizes.q_rows`. The number of iterations depends on the data: one compilation serves all lengths, and a call
    costs what its own lengths cost.

    Raises:
        NotImplementedError: q or the pages are float64.
    """
    check_supported(q, pages)
    tokens = q.shape[0]
    blocks = block_sizes or default_block_sizes(pages)
    most_rows = max(1, min(blocks.q_rows, tokens, batch.max_q_len or tokens))
    q, tree_mask = jax.tree.map(  # the last tile may extend past the end
        lambda rows: jnp.pad(rows, ((0, most_rows - 1), *[(0, 0)] * (rows.ndim - 1))), (q, batch.tree_mask)
    )
    batch = dataclasses.replace(batch, tree_mask=tree_mask)
    results = (
        jnp.zeros((*q.shape[:2], pages.v_head_dim), q.dtype),
        jnp.full(q.shape[:2], -jnp.inf, jnp.float32),
    )
    for single_rows in (True,) if batch.max_q_len == 1 else (True, False):
        walk = Walk(
            q, pages, batch, spec, head_params, q_rows=1 if single_rows else most_rows, kv_pages=blocks.kv_pages
        )
        results = walk.fill(results, tokens, single_rows=single_rows)
    out, lse = results
    return out[:tokens], lse[:tokens]


def default_block_sizes(pages: KVPages) -> BlockSizes:
    """Returns 64 rows, and pages for at most 256 keys. A block of 2 MiB in float32 fits in the CPU's cache."""
    key_bytes = 4 * pages.num_kv_heads * (pages.head_dim + pages.v_head_dim)
    keys = min(DEFAULT_KEYS, MOST_BLOCK_BYTES // key_bytes)
    return BlockSizes(q_rows=DEFAULT_Q_ROWS, kv_pages=max(1, keys // pages.page_size))


def check_supported(q: Array, pages: KVPages) -> None:
    for name, dtype in (("q", q.dtype), ("pages", pages.dtype)):
        if dtype == jnp.float64:
            raise NotImplementedError(
                f"{name} has dtype float64; the xla backend computes in float32: cast it, or use backend='reference'"
            )


@dataclasses.dataclass(frozen=True)
class Walk:
    """One loop over all tiles of `q_rows` rows; each tile loops over blocks of `kv_pages` pages."""

    q: Float[Array, "padded_tokens q_heads head_dim"]
    pages: KVPages
    batch: RaggedBatch
    spec: AttentionSpec
    head_params: HeadParams
    q_rows: int
    kv_pages: int

    @property
    def q_per_kv(self) -> int:
        """Query heads per KV head."""
        return self.q.shape[1] // self.pages.num_kv_heads

    def fill(self, results, tokens: int, *, single_rows: bool):
        """Returns `results`, the padded output and log-sum-exp, with the rows of all tiles filled in."""
        work, count = make_work_list(
            self.batch,
            self.spec,
            tokens=tokens,
            page_size=self.pages.page_size,
            q_rows=self.q_rows,
            single_rows=single_rows,
        )

        def fill_tile(index, results):
            tile = work[index]
            return jax.tree.map(lambda whole, part: self.put_rows(whole, tile, part), results, self.attend(tile))

        return jax.lax.fori_loop(0, count, fill_tile, results)

    def attend(self, tile: WorkList) -> tuple[Float[Array, "kv_heads rows v_head_dim"], Float[Array, "kv_heads rows"]]:
        """Returns the output and the log-sum-exp of the tile's rows, in float32."""
        page_size = self.pages.page_size
        q = self.take_rows(tile)
        t = tile.position + jnp.arange(self.q_rows, dtype=jnp.int32)[:, None]

        def attend_block(block, state):
            first_page = tile.first_page + block * self.kv_pages
            p = first_page * page_size + jnp.arange(self.kv_pages * page_size, dtype=jnp.int32)
            sees = self.is_token(t) & visible(self.spec, t, p, tile.kv_end, self.in_tree(tile, p))  # [rows, keys]
            k, v = self.fetch(tile, first_page)
            s = logits(q, k, self.spec.soft_cap) + self.bias(t, p)
            s = jnp.where(jnp.repeat(sees, self.q_per_kv, axis=0), s, -jnp.inf)
            # A slot that no row may read can hold NaN, and 0 * NaN is NaN.
            return state.add_keys(s, jnp.where(sees.any(axis=0)[:, None], v, 0))

        start = SoftmaxState.initial(self.sinks(t), self.pages.v_head_dim)
        blocks = tile.num_blocks(page_size, self.kv_pages)
        return jax.lax.fori_loop(0, blocks, attend_block, start).finish()

    def fetch(
        self, tile: WorkList, first_page: Int32[Array, ""]
    ) -> tuple[Float[Array, "kv_heads keys head_dim"], Float[Array, "kv_heads keys v_head_dim"]]:
        """Returns K and V of a block of pages, in float32. Past the tile's last page, that page is repeated."""
        index = first_page + jnp.arange(self.kv_pages, dtype=jnp.int32)
        index = jnp.minimum(index, tile.end_page(self.pages.page_size) - 1)
        k, v = take_float32(self.pages, self.batch.page_table[tile.seq, index])
        return _by_head(k), _by_head(v)

    def is_token(self, t: Int32[Array, "q_rows 1"]) -> Bool[Array, "q_rows 1"]:
        """False for rows before position 0 of their sequence."""
        return jnp.ones_like(t, bool) if self.batch.q_starts is not None else t >= 0

    def in_tree(self, tile: WorkList, p: Int32[Array, " keys"]) -> Bool[Array, "q_rows keys"] | None:
        """True where the tree mask shows a row a key; None without a tree mask."""
        if self.batch.tree_mask is None:
            return None
        rows = jax.lax.dynamic_slice_in_dim(self.batch.tree_mask, tile.first_row, self.q_rows)
        words = [rows[:, index : index + 1] for index in range(rows.shape[1])]
        return in_tree(words, self.batch.first_positions[tile.seq], p)

    def bias(
        self, t: Int32[Array, "q_rows 1"], p: Int32[Array, " keys"]
    ) -> Float[Array, "kv_heads rows keys"] | Literal[0]:
        """What ALiBi adds to the logits."""
        if self.head_params.alibi_slopes is None:
            return 0
        slopes = jnp.tile(self.of_kv_heads(self.head_params.alibi_slopes), self.q_rows)  # [kv_heads, rows]
        distance = jnp.repeat(jnp.abs(t - p), self.q_per_kv, axis=0)  # [rows, keys]
        return -slopes[..., None] * distance

    def sinks(self, t: Int32[Array, "q_rows 1"]) -> Float[Array, "kv_heads rows"]:
        """The sink of each row; -inf for none."""
        kv_heads = self.pages.num_kv_heads
        if self.head_params.sinks is None:
            return jnp.full((kv_heads, self.q_rows * self.q_per_kv), -jnp.inf)
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
        is_tiles = jnp.arange(self.q_rows).reshape(-1, *[1] * (part.ndim - 1)) < tile.num_rows
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
