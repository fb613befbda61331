"""The definition of correct: attention over pages, one query row at a time, as the equation reads.

Computes in float64 where jax has it enabled (`jax.enable_x64`), else in float32. Slow, and meant to be.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from paged_kernels.batch import RaggedBatch, token_rows
from paged_kernels.layout import KVPages
from paged_kernels.spec import AttentionSpec


def paged_attention_reference(
    q: Float[Array, "tokens q_heads head_dim"], pages: KVPages, batch: RaggedBatch, spec: AttentionSpec
) -> tuple[Float[Array, "tokens q_heads head_dim"], Float[Array, "tokens q_heads"]]:
    """The output in `q.dtype`, and the log-sum-exp of each row's logits (natural log; -inf where no key is visible)."""
    exact = jax.dtypes.canonicalize_dtype(jnp.float64)  # float32 where float64 is not enabled
    tokens, q_heads, head_dim = q.shape
    kv_heads, group = pages.num_kv_heads, q_heads // pages.num_kv_heads
    scale = spec.resolved_scale(head_dim)
    k_pages, v_pages = pages.k, pages.v
    rows = token_rows(batch, tokens)

    def attend(row):
        q_row, seq, t = row
        p = jnp.arange(batch.pages_per_seq * pages.page_size)  # the position of each key
        visible = (p < batch.kv_lens[seq]) & (t >= 0)
        if spec.causal:
            visible &= p <= t
        if spec.sliding_window is not None:
            visible &= t - p < spec.sliding_window

        def keys_of(paged):  # [kv_heads, keys, head_dim]; what is not visible may be NaN
            flat = paged[:, batch.page_table[seq]].reshape(kv_heads, -1, head_dim).astype(exact)
            return jnp.where(visible[:, None], flat, 0)

        q_groups = q_row.reshape(kv_heads, group, head_dim).astype(exact)
        s = scale * jnp.einsum("hgd,hpd->hgp", q_groups, keys_of(k_pages))
        if spec.soft_cap is not None:
            s = spec.soft_cap * jnp.tanh(s / spec.soft_cap)
        s = jnp.where(visible, s, -jnp.inf)
        lse = jax.nn.logsumexp(s, axis=-1)  # [kv_heads, group]
        weights = jnp.where(visible, jnp.exp(s - jnp.where(jnp.isneginf(lse), 0, lse)[..., None]), 0)
        out = jnp.einsum("hgp,hpd->hgd", weights, keys_of(v_pages))
        return out.reshape(q_heads, head_dim), lse.reshape(q_heads)

    out, lse = jax.lax.map(attend, (q, rows.seq, rows.position))
    return out.astype(q.dtype), lse
