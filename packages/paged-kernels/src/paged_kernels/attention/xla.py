"""Attention over pages in plain XLA: a walk over tiles of rows and blocks of pages with an online softmax."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from paged_kernels.batch import RaggedBatch
from paged_kernels.block_sizes import BlockSizes
from paged_kernels.layout import KVPages
from paged_kernels.spec import AttentionSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tiles:
    """The rows of each tile and the pages that it needs: integers alone; entries past `count` mean nothing."""

    seq: Int32[Array, " tiles"]
    """The sequence that the tile's rows belong to."""
    first_row: Int32[Array, " tiles"]
    """Row of q at which it starts."""
    num_rows: Int32[Array, " tiles"]
    """Rows of it that are the sequence's."""
    first_position: Int32[Array, " tiles"]
    """Position of its first row."""
    first_page: Int32[Array, " tiles"]
    """Index in the sequence's page table of the first page that a row can see."""
    end_page: Int32[Array, " tiles"]
    """Index after the last such page."""
    count: Int32[Array, ""]
    """How many tiles there are."""


def list_tiles(
    batch: RaggedBatch, spec: AttentionSpec, *, tokens: int, page_size: int, q_rows: int, lone_rows: bool
) -> Tiles:
    """The tiles of `q_rows` rows of the sequences that have one row (`lone_rows`) or of those that have more."""
    q_lens = batch.cu_q_lens[1:] - batch.cu_q_lens[:-1]
    chosen = (jnp.arange(batch.seqs) < batch.num_seqs) & (batch.kv_lens > 0) & ((q_lens == 1) == lone_rows)
    ends = jnp.cumsum(jnp.where(chosen, -(-q_lens // q_rows), 0), dtype=jnp.int32)
    tile = jnp.arange(min(tokens, tokens // q_rows + batch.seqs), dtype=jnp.int32)
    seq = jnp.minimum(jnp.searchsorted(ends, tile, side="right"), batch.seqs - 1).astype(jnp.int32)
    start = (tile - jnp.where(seq > 0, ends[seq - 1], 0)) * q_rows  # first row within the sequence
    num_rows = jnp.minimum(q_rows, q_lens[seq] - start)
    position = batch.kv_lens[seq] - q_lens[seq] + start
    kv_end = jnp.minimum(batch.kv_lens[seq], batch.pages_per_seq * page_size)
    if spec.causal:
        kv_end = jnp.minimum(kv_end, position + num_rows)
    kv_start = jnp.zeros_like(kv_end)
    if spec.sliding_window is not None:
        kv_start = jnp.maximum(0, position - spec.sliding_window + 1)
    return Tiles(
        seq=seq,
        first_row=batch.cu_q_lens[seq] + start,
        num_rows=num_rows,
        first_position=position,
        first_page=kv_start // page_size,
        end_page=-(-kv_end // page_size),
        count=ends[-1],
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Softmax:
    """An online softmax: what is known of each row after some of its keys (Milakov and Gimelshein 2018)."""

    top: Float[Array, "*rows"]
    """Largest logit so far; -inf before any."""
    total: Float[Array, "*rows"]
    """Sum of `exp(s - top)`."""
    values: Float[Array, "*rows head_dim"]
    """Sum of `exp(s - top) v`."""


def paged_attention_xla(
    q: Float[Array, "tokens q_heads head_dim"],
    pages: KVPages,
    batch: RaggedBatch,
    spec: AttentionSpec,
    block_sizes: BlockSizes | None,
) -> tuple[Float[Array, "tokens q_heads head_dim"], Float[Array, "tokens q_heads"]]:
    """The output in `q.dtype`, and the log-sum-exp of each row's logits (natural log; -inf where no key is visible)."""
    blocks = block_sizes or BlockSizes(q_rows=64, kv_pages=max(1, 256 // pages.page_size))
    out = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:2], -jnp.inf)
    out = _attend_tiles(out, q, pages, batch, spec, dataclasses.replace(blocks, q_rows=1), lone_rows=True)
    if batch.max_q_len != 1:
        out = _attend_tiles(out, q, pages, batch, spec, blocks, lone_rows=False)
    return out[0].astype(q.dtype), out[1]


def _attend_tiles(out, q, pages, batch, spec, blocks, *, lone_rows):
    tokens, q_heads, head_dim = q.shape
    blocks = dataclasses.replace(blocks, q_rows=min(blocks.q_rows, tokens))
    rows, heads, group = blocks.q_rows, pages.num_kv_heads, q_heads // pages.num_kv_heads
    kv_len_limit = batch.pages_per_seq * pages.page_size
    tiles = list_tiles(batch, spec, tokens=tokens, page_size=pages.page_size, q_rows=rows, lone_rows=lone_rows)
    q = jnp.pad(q, ((0, rows - 1), (0, 0), (0, 0)))  # so that the last tile may run over the end
    out = jax.tree.map(lambda x: jnp.pad(x, ((0, rows - 1),) + ((0, 0),) * (x.ndim - 1)), out)

    def attend(index, out):
        tile = jax.tree.map(lambda x: x if x.ndim == 0 else x[index], tiles)
        q_tile = jax.lax.dynamic_slice_in_dim(q, tile.first_row, rows).astype(jnp.float32) * spec.resolved_scale(
            head_dim
        )
        q_tile = (
            q_tile.reshape(rows, heads, group, head_dim).transpose(1, 0, 2, 3).reshape(heads, rows * group, head_dim)
        )
        t = tile.first_position + jnp.arange(rows)
        kv_len = jnp.minimum(batch.kv_lens[tile.seq], kv_len_limit)

        def see(block, state):
            first = tile.first_page + block * blocks.kv_pages
            ids = batch.page_table[tile.seq, jnp.minimum(first + jnp.arange(blocks.kv_pages), tile.end_page - 1)]
            kv = pages.take(ids).astype(jnp.float32).swapaxes(0, 1).reshape(heads, -1, 2 * head_dim)
            p = first * pages.page_size + jnp.arange(kv.shape[1])
            visible = (p < kv_len)[None] & (t >= 0)[:, None]
            if spec.causal:
                visible &= p[None] <= t[:, None]
            if spec.sliding_window is not None:
                visible &= t[:, None] - p[None] < spec.sliding_window
            k, v = kv[..., :head_dim], jnp.where(visible.any(0)[:, None], kv[..., head_dim:], 0)
            s = jnp.einsum("hrd,hpd->hrp", q_tile, k, precision="highest")
            if spec.soft_cap is not None:
                s = spec.soft_cap * jnp.tanh(s / spec.soft_cap)
            s = jnp.where(jnp.repeat(visible, group, axis=0), s, -jnp.inf)
            top = jnp.maximum(state.top, s.max(-1))
            finite = jnp.where(jnp.isneginf(top), 0, top)
            weights = jnp.exp(s - finite[..., None])
            decay = jnp.exp(state.top - finite)
            return Softmax(
                top=top,
                total=state.total * decay + weights.sum(-1),
                values=state.values * decay[..., None] + jnp.einsum("hrp,hpd->hrd", weights, v, precision="highest"),
            )

        shape = (heads, rows * group)
        state = Softmax(jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, head_dim)))
        num_blocks = -(-(tile.end_page - tile.first_page) // blocks.kv_pages)
        state = jax.lax.fori_loop(0, num_blocks, see, state)
        seen = state.total > 0
        total = jnp.where(seen, state.total, 1)
        result = state.values / total[..., None], jnp.where(seen, state.top + jnp.log(total), -jnp.inf)
        is_row = jnp.arange(rows) < tile.num_rows

        def put(whole, part):
            part = part.reshape(heads, rows, group, *part.shape[2:]).swapaxes(0, 1).reshape(rows, *whole.shape[1:])
            old = jax.lax.dynamic_slice_in_dim(whole, tile.first_row, rows)
            new = jnp.where(is_row.reshape(-1, *[1] * (part.ndim - 1)), part, old)
            return jax.lax.dynamic_update_slice_in_dim(whole, new, tile.first_row, 0)

        return jax.tree.map(put, out, result)

    out = jax.lax.fori_loop(0, tiles.count, attend, out)
    return jax.tree.map(lambda x: x[:tokens], out)
