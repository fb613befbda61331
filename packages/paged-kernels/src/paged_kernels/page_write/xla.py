"""The page write as one scatter: the definition, and the implementation where there is no kernel."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from paged_kernels.batch import RaggedBatch, token_rows
from paged_kernels.layout import KVPages


def write_kv_xla(
    pages: KVPages,
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    batch: RaggedBatch,
) -> KVPages:
    """Pages with each row's `K‖V` in its slot; rows that are no token are dropped."""
    rows = token_rows(batch, k.shape[0])
    page_index = rows.position // pages.page_size
    is_token = (rows.position >= 0) & (page_index < batch.pages_per_seq)
    page_ids = batch.page_table[rows.seq, jnp.clip(page_index, 0, batch.pages_per_seq - 1)]
    return pages.put_rows(
        jnp.where(is_token, page_ids, 0), rows.position % pages.page_size, jnp.concatenate([k, v], axis=-1)
    )
