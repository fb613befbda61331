"""The reference: attention over pages, one query row at a time, written like the equation.

It defines what is correct. It computes in float64 if that is enabled in jax (`jax.enable_x64`), else in float32. It is
slow.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from paged_kernels._src.batch import RaggedBatch, token_rows
from paged_kernels._src.head_params import HeadParams
from paged_kernels._src.kv_pages import KVPages
from paged_kernels._src.spec import AttentionSpec


def paged_attention_reference(
    q: Float[Array, "tokens q_heads head_dim"],
    pages: KVPages,
    batch: RaggedBatch,
    spec: AttentionSpec,
    head_params: HeadParams,
) -> tuple[Float[Array, "tokens q_heads v_head_dim"], Float[Array, "tokens q_heads"]]:
    """Returns the output in `q.dtype`, and the log of each row's softmax denominator; 0 and -inf for non-tokens."""
    exact = jax.dtypes.canonicalize_dtype(jnp.float64)  # float32 where float64 is not enabled
    tokens, q_heads, head_dim = q.shape
    kv_heads = pages.num_kv_heads
    k_pages, v_pages = pages.k, pages.v
    rows = token_rows(batch, tokens)
    p = jnp.arange(batch.pages_per_seq * pages.page_size, dtype=jnp.int32)  # the position of each key
    sinks, slopes = (
        None if x is None else x.astype(exact).reshape(kv_heads, -1)
        for x in (head_params.sinks, head_params.alibi_slopes)
    )

    def attend(row):
        row_index, q_row, seq, t, is_token = row
        visible = (p < batch.kv_lens[seq]) & is_token
        if batch.tree_mask is not None:
            new = p - batch.first_positions[seq]
            word = batch.tree_mask[row_index].at[new // 32].get(mode="fill", fill_value=0)
            visible &= (new < 0) | (((word >> (new % 32)) & 1) == 1)
        elif spec.causal:
            visible &= p <= t
        if spec.sliding_window is not None:
            visible &= t - p < spec.sliding_window

        def keys_of(paged):  # [kv_heads, keys, dim]; keys that are not visible may be NaN
            flat = paged[:, batch.page_table[seq]].reshape(kv_heads, p.size, -1).astype(exact)
            return jnp.where(visible[:, None], flat, 0)

        q_by_head = q_row.reshape(kv_heads, -1, head_dim).astype(exact)
        s = spec.resolved_scale(head_dim) * jnp.einsum("hgd,hpd->hgp", q_by_head, keys_of(k_pages))
        if spec.soft_cap is not None:
            s = spec.soft_cap * jnp.tanh(s / spec.soft_cap)
        if slopes is not None:
            s -= slopes[..., None] * jnp.abs(t - p).astype(exact)[None, None]
        s = jnp.where(visible, s, -jnp.inf)
        lse = jax.nn.logsumexp(s, axis=-1)  # [kv_heads, q_per_kv]
        if sinks is not None:
            lse = jnp.where(is_token, jnp.logaddexp(lse, sinks), lse)
        weights = jnp.where(visible, jnp.exp(s - jnp.where(jnp.isneginf(lse), 0, lse)[..., None]), 0)
        out = jnp.einsum("hgp,hpd->hgd", weights, keys_of(v_pages))
        return out.reshape(q_heads, -1), lse.reshape(q_heads)

    out, lse = jax.lax.map(attend, (jnp.arange(tokens, dtype=jnp.int32), q, rows.seq, rows.position, rows.is_token))
    return out.astype(q.dtype), lse
