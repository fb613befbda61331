"""The seed's two calls on separate K and V pages, for code written against them.

Each call copies the pages into `KVPages` first; hold `KVPages` and call `paged_attention` to avoid that.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from paged_kernels._src.attention.api import attend_batch, paged_attention
from paged_kernels._src.backends.base import Backend
from paged_kernels._src.backends.table import candidates
from paged_kernels._src.batch import RaggedBatch
from paged_kernels._src.device import current_platform
from paged_kernels._src.head_params import HeadParams
from paged_kernels._src.kv_pages import KVPages
from paged_kernels._src.spec import AttentionSpec

DEFAULT_MASK_VALUE = -0.7 * float(jnp.finfo(jnp.float32).max)


def pallas_paged_attention(
    q: Float[Array, "seqs q_heads head_dim"],
    k_pages: Float[Array, "kv_heads pages page_size head_dim"],
    v_pages: Float[Array, "kv_heads pages page_size head_dim"],
    lengths: Int32[Array, " seqs"],
    page_indices: Int32[Array, "seqs pages_per_seq"],
    *,
    sm_scale: float | None = None,
    mask_value: float = DEFAULT_MASK_VALUE,
    attn_logits_soft_cap: float | None = None,
    pages_per_compute_block: int | None = None,
    backend: str | Backend | None = None,
) -> Float[Array, "seqs q_heads head_dim"]:
    """Decode: each of `seqs` queries over its first `lengths` keys; a length of 0 gives a row of zeros.

    Args:
        q: one query a sequence.
        k_pages: the keys.
        v_pages: the values, of the same shape and dtype.
        lengths: keys that each query sees, int32.
        page_indices: the pages of each sequence in order, any number of them.
        sm_scale: `AttentionSpec.softmax_scale`.
        mask_value: taken and checked, but without effect: what is masked weighs exactly nothing.
        attn_logits_soft_cap: `AttentionSpec.soft_cap`.
        pages_per_compute_block: pages that are attended at once, any number; `None` picks by chip.
        backend: as in `paged_attention`.

    Raises:
        ValueError: `mask_value` would not mask, or as `paged_attention`.
        NotImplementedError: as `paged_attention`.
    """
    if not -math.inf < mask_value <= -1e9:
        raise ValueError(f"mask_value={mask_value} must be finite and at most -1e9, so that masked keys weigh nothing")
    seqs = q.shape[0]
    batch = RaggedBatch(
        page_table=page_indices,
        kv_lens=lengths,
        cu_q_lens=jnp.arange(seqs + 1, dtype=jnp.int32),
        num_seqs=jnp.int32(seqs),
        max_q_len=1,
    )
    spec = AttentionSpec(softmax_scale=sm_scale, soft_cap=attn_logits_soft_cap)
    backends = candidates(backend, current_platform())
    if pages_per_compute_block is not None:
        backends = (one.with_block_sizes(q_rows=1, kv_pages=pages_per_compute_block) for one in backends)
    return attend_batch(q, KVPages.from_kv(k_pages, v_pages), batch, spec, HeadParams(), backends=backends)[0]


def pallas_prefill_attention(
    q: Float[Array, "chunk q_heads head_dim"],
    k_pages: Float[Array, "kv_heads pages page_size head_dim"],
    v_pages: Float[Array, "kv_heads pages page_size head_dim"],
    length: Int32[Array, ""],
    page_indices: Int32[Array, " pages_per_seq"],
    *,
    sm_scale: float | None = None,
    backend: str | Backend | None = None,
) -> Float[Array, "chunk q_heads head_dim"]:
    """One chunk of one prompt, causal; `length` counts all tokens, this chunk's included.

    Nothing says where the chunk starts, so it is taken to be the last multiple of its size below `length`: every
    chunk but the last must be full. Rows past the prompt's end give zeros, and so does a `length` of 0.

    Raises:
        ValueError: `length` is no integer, or as `paged_attention`.
        NotImplementedError: as `paged_attention`.
    """
    chunk = q.shape[0]
    length = jnp.asarray(length)
    if not jnp.issubdtype(length.dtype, jnp.integer):
        raise ValueError(f"length has dtype {length.dtype}; it must be an integer, the number of tokens")
    length = length.astype(jnp.int32)
    rows = jnp.where(length > 0, (length - 1) % chunk + 1, 0)
    batch = RaggedBatch(
        page_table=page_indices[None],
        kv_lens=length[None],
        cu_q_lens=jnp.stack([jnp.int32(0), rows]),
        num_seqs=jnp.int32(1),
    )
    pages = KVPages.from_kv(k_pages, v_pages)
    return paged_attention(q, pages, batch, AttentionSpec(softmax_scale=sm_scale), backend=backend)
