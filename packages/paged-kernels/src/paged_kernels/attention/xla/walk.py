"""The walk: each tile of rows passes over its own blocks of pages and no others (docs/kernels/xla.md)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from paged_kernels.attention.mask import visible
from paged_kernels.attention.xla.softmax import SoftmaxState, logits
from paged_kernels.attention.xla.tiles import Tiles, list_tiles
from paged_kernels.batch import RaggedBatch
from paged_kernels.block_sizes import BlockSizes
from paged_kernels.layout import KVPages
from paged_kernels.spec import AttentionSpec

DEFAULT_Q_ROWS = 64
DEFAULT_KEYS = 256
MOST_BLOCK_BYTES = 2 * 2**20

Output = Float[Array, "tokens q_heads head_dim"]
LogSumExp = Float[Array, "tokens q_heads"]


def paged_attention_xla(
    q: Output, pages: KVPages, batch: RaggedBatch, spec: AttentionSpec, block_sizes: BlockSizes | None
) -> tuple[Output, LogSumExp]:
    """The output in `q.dtype`, and the log-sum-exp of each row's logits (natural log; -inf where no key is visible).

    Sequences with a single row are walked in tiles of one row, the others in tiles of `block_sizes.q_rows`.
    Trip counts are data: one compilation serves all lengths, and each call costs what its lengths cost.

    Raises:
        NotImplementedError: q or the pages are float64.
    """
    _check_supported(q, pages)
    tokens = q.shape[0]
    blocks = block_sizes or default_block_sizes(pages)
    most_rows = max(1, min(blocks.q_rows, tokens, batch.max_q_len or tokens))
    q = jnp.pad(q, ((0, most_rows - 1), (0, 0), (0, 0)))  # the last tile may run over the end
    results = jnp.zeros_like(q), jnp.full(q.shape[:2], -jnp.inf, jnp.float32)
    for lone_rows in (True,) if batch.max_q_len == 1 else (True, False):
        walk = Walk(q, pages, batch, spec, q_rows=1 if lone_rows else most_rows, kv_pages=blocks.kv_pages)
        results = walk.fill(results, tokens, lone_rows=lone_rows)
    out, lse = results
    return out[:tokens], lse[:tokens]


def default_block_sizes(pages: KVPages) -> BlockSizes:
    """64 rows, and pages for 256 keys or fewer: a block should lie in the cache, which 2 MiB in float32 do."""
    key_bytes = 2 * 4 * pages.num_kv_heads * pages.head_dim
    keys = min(DEFAULT_KEYS, MOST_BLOCK_BYTES // key_bytes)
    return BlockSizes(q_rows=DEFAULT_Q_ROWS, kv_pages=max(1, keys // pages.page_size))


def _check_supported(q: Array, pages: KVPages) -> None:
    for name, dtype in (("q", q.dtype), ("pages", pages.dtype)):
        if dtype == jnp.float64:
            raise NotImplementedError(
                f"{name} has dtype float64; the xla backend computes in float32: cast it, or use backend='reference'"
            )


@dataclasses.dataclass(frozen=True)
class Walk:
    """One pass over the tiles of `q_rows` rows, each in blocks of `kv_pages` pages."""

    q: Float[Array, "padded_tokens q_heads head_dim"]
    pages: KVPages
    batch: RaggedBatch
    spec: AttentionSpec
    q_rows: int
    kv_pages: int

    @property
    def group(self) -> int:
        """Query heads a KV head."""
        return self.q.shape[1] // self.pages.num_kv_heads

    def fill(self, results, tokens: int, *, lone_rows: bool):
        """`results`, the padded output and log-sum-exp, with the rows of all tiles put in."""
        tiles, count = list_tiles(
            self.batch,
            self.spec,
            tokens=tokens,
            page_size=self.pages.page_size,
            q_rows=self.q_rows,
            lone_rows=lone_rows,
        )

        def fill_tile(index, results):
            tile = tiles[index]
            return jax.tree.map(lambda whole, part: self.put_rows(whole, tile, part), results, self.attend(tile))

        return jax.lax.fori_loop(0, count, fill_tile, results)

    def attend(self, tile: Tiles) -> tuple[Float[Array, "kv_heads rows head_dim"], Float[Array, "kv_heads rows"]]:
        """Output and log-sum-exp of the tile's rows, float32."""
        page_size, head_dim = self.pages.page_size, self.pages.head_dim
        q = self.take_rows(tile)
        t = tile.position + jnp.arange(self.q_rows, dtype=jnp.int32)[:, None]

        def see_block(block, state):
            first_page = tile.first_page + block * self.kv_pages
            p = first_page * page_size + jnp.arange(self.kv_pages * page_size, dtype=jnp.int32)
            sees = (t >= 0) & visible(self.spec, t, p, tile.kv_end)  # [rows, keys]
            kv = self.fetch(tile, first_page)
            s = logits(q, kv[..., :head_dim], self.spec.soft_cap)
            s = jnp.where(jnp.repeat(sees, self.group, axis=0), s, -jnp.inf)
            # A slot that nobody may read can hold NaN, which a weight of zero does not silence.
            v = jnp.where(sees.any(axis=0)[:, None], kv[..., head_dim:], 0)
            return state.see(s, v)

        empty = SoftmaxState.empty(*q.shape)
        blocks = tile.num_blocks(page_size, self.kv_pages)
        return jax.lax.fori_loop(0, blocks, see_block, empty).finish()

    def fetch(self, tile: Tiles, first_page: Int32[Array, ""]) -> Float[Array, "kv_heads keys two_head_dim"]:
        """`K‖V` of a block of pages, float32. Past the tile's last page that page is repeated."""
        index = first_page + jnp.arange(self.kv_pages, dtype=jnp.int32)
        index = jnp.minimum(index, tile.end_page(self.pages.page_size) - 1)
        kv = take_float32(self.pages, self.batch.page_table[tile.seq, index])
        return kv.swapaxes(0, 1).reshape(kv.shape[1], -1, kv.shape[3])

    def take_rows(self, tile: Tiles) -> Float[Array, "kv_heads rows head_dim"]:
        """The tile's rows of q with the scale, float32, the group's heads as rows: `row * group + head`."""
        head_dim = self.q.shape[2]
        rows = jax.lax.dynamic_slice_in_dim(self.q, tile.first_row, self.q_rows).astype(jnp.float32)
        rows = (
            rows.reshape(self.q_rows, -1, self.group, head_dim)
            .swapaxes(0, 1)
            .reshape(-1, self.q_rows * self.group, head_dim)
        )
        return rows * self.spec.resolved_scale(head_dim)

    def put_rows(self, whole: Array, tile: Tiles, part: Array) -> Array:
        """`whole [padded_tokens, q_heads, ...]` with the tile's rows from `part [kv_heads, rows, ...]`."""
        rest = part.shape[2:]
        part = part.reshape(-1, self.q_rows, self.group, *rest).swapaxes(0, 1).reshape(self.q_rows, -1, *rest)
        before = jax.lax.dynamic_slice_in_dim(whole, tile.first_row, self.q_rows)
        is_tiles = jnp.arange(self.q_rows).reshape(-1, *[1] * (part.ndim - 1)) < tile.num_rows
        rows = jnp.where(is_tiles, part.astype(whole.dtype), before)
        return jax.lax.dynamic_update_slice_in_dim(whole, rows, tile.first_row, 0)


def take_float32(pages: KVPages, page_ids: Int32[Array, " ids"]) -> Float[Array, "ids kv_heads page_size two_head_dim"]:
    """`pages.take(page_ids)` in float32, in time and memory proportional to what is taken.

    XLA's CPU backend has no bfloat16 gather: it converts all pages to float32, and hoists that out of the loop. So
    bfloat16 is gathered as its bits, which are the upper half of a float32's, and the barrier keeps the
    reinterpretation in the loop, where it fuses with the gather.
    """
    pages, page_ids = jax.lax.optimization_barrier((pages, page_ids))
    if pages.dtype != jnp.bfloat16:
        return pages.take(page_ids).astype(jnp.float32)
    bits = jax.tree.map(lambda data: jax.lax.bitcast_convert_type(data, jnp.uint16), pages).take(page_ids)
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)
