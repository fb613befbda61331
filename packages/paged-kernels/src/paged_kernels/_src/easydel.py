"""EasyDeL's two calls on separate K and V pages, for code that uses them.

Each call copies the pages into `KVPages` first. To avoid that, hold `KVPages` and call `paged_attention`.
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
    """EasyDeL's name for decode: each of `seqs` queries attends to its first `lengths` keys.

    A length of 0 gives a row of zeros.

    Args:
        q: one query per sequence.
        k_pages: the keys.
        v_pages: the values, of the same shape and dtype.
        lengths: the number of keys that each query sees, int32.
        page_indices: the pages of each sequence in order, of any width.
        sm_scale: `AttentionSpec.softmax_scale`.
        mask_value: checked, but without effect: masked keys always have weight 0.
        attn_logits_soft_cap: `AttentionSpec.soft_cap`.
        pages_per_compute_block: pages that are attended together, any number; `None` uses the backend's default.
        backend: see `paged_attention`.

    Raises:
        ValueError: `mask_value` would not mask; or see `paged_attention`.
        NotImplementedError: see `paged_attention`.
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
    """EasyDeL's name for one prefill chunk of one prompt, causal.

    `length` is the number of all tokens up to the end of the chunk. The chunk is assumed to start at the last multiple
    of its size below `length`, so every chunk but the last must be full. Rows past the prompt's end give zeros, and so
    does a `length` of 0.

    Raises:
        ValueError: `length` is not an integer; or see `paged_attention`.
        NotImplementedError: see `paged_attention`.
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
