"""The one call for attention over pages."""

import functools
from typing import Literal, overload

import jax
from jaxtyping import Array, Float

from paged_kernels._src.attention.reference import paged_attention_reference
from paged_kernels._src.attention.tpu.launch import paged_attention_tpu
from paged_kernels._src.attention.xla import paged_attention_xla
from paged_kernels._src.backends import Backend, resolve_backend, without_gradient
from paged_kernels._src.batch import RaggedBatch
from paged_kernels._src.block_sizes import BlockSizes
from paged_kernels._src.head_params import HeadParams
from paged_kernels._src.kv_pages import KVPages
from paged_kernels._src.spec import AttentionSpec
from paged_kernels._src.validation import check_attention_inputs

Queries = Float[Array, "tokens q_heads head_dim"]
Output = Float[Array, "tokens q_heads v_head_dim"]
LogSumExp = Float[Array, "tokens q_heads"]


@overload
def paged_attention(
    q: Queries,
    pages: KVPages,
    batch: RaggedBatch,
    spec: AttentionSpec,
    head_params: HeadParams | None = None,
    *,
    backend: Backend | None = None,
    block_sizes: BlockSizes | None = None,
    return_lse: Literal[False] = False,
) -> Output: ...
@overload
def paged_attention(
    q: Queries,
    pages: KVPages,
    batch: RaggedBatch,
    spec: AttentionSpec,
    head_params: HeadParams | None = None,
    *,
    backend: Backend | None = None,
    block_sizes: BlockSizes | None = None,
    return_lse: Literal[True],
) -> tuple[Output, LogSumExp]: ...
def paged_attention(
    q: Queries,
    pages: KVPages,
    batch: RaggedBatch,
    spec: AttentionSpec,
    head_params: HeadParams | None = None,
    *,
    backend: Backend | None = None,
    block_sizes: BlockSizes | None = None,
    return_lse: bool = False,
) -> Output | tuple[Output, LogSumExp]:
    """Attention of each query row over the pages of its sequence, in `q.dtype`; zeros for rows that are no token.

    `out[t, h] = sum_p softmax_p(s(t, p)) v[p, h // group]`, with the logits `s` and the visible keys as
    `AttentionSpec`, `HeadParams` and the batch's tree mask define them, and `group = q_heads / kv_heads`. Any mix of
    prefill, decode, multi-token decode and idle sequences.

    Args:
        q: the queries, float32, bfloat16 or float16.
        pages: one layer's keys and values; the batch's own tokens must have been written (`write_kv`).
        batch: which rows belong to which sequence, and its pages.
        spec: scale, masks and cap.
        head_params: sinks and ALiBi slopes of the query heads.
        backend: `None` picks by platform.
        block_sizes: how a backend cuts the work; never changes the result beyond rounding. `None` picks by chip.
        return_lse: also return the log of the softmax denominator, `log sum_p exp(s(t, p))` (and the sink),
            `[tokens, q_heads]`, -inf where there is nothing to sum; float32, or float64 from `reference` where that is
            enabled. Outputs over different keys merge by it (`merge_attention_states`).

    Raises:
        ValueError: an argument does not fit the others, or the backend cannot run here.
        NotImplementedError: the backend does not have what the arguments ask for, or a gradient is taken through one
            that has none; says what does.
    """
    head_params = head_params or HeadParams()
    check_attention_inputs(q, pages, batch, head_params)
    backend = resolve_backend(backend)
    out, lse = _attend(
        q, pages, batch, spec, head_params, backend=backend, block_sizes=block_sizes, return_lse=return_lse
    )
    return (out, lse) if return_lse else out


# Compiled as one, so that eager calls compile once.
@functools.partial(jax.jit, static_argnames=("backend", "block_sizes", "return_lse"))
def _attend(
    q: Queries,
    pages: KVPages,
    batch: RaggedBatch,
    spec: AttentionSpec,
    head_params: HeadParams,
    *,
    backend: Backend,
    block_sizes: BlockSizes | None,
    return_lse: bool,
) -> tuple[Output, LogSumExp | None]:
    if backend == "reference":
        return paged_attention_reference(q, pages, batch, spec, head_params)

    def attend(q, pages, batch, head_params):
        if backend == "xla":
            return paged_attention_xla(q, pages, batch, spec, head_params, block_sizes=block_sizes)
        interpret = backend == "tpu_interpret"
        return paged_attention_tpu(
            q, pages, batch, spec, head_params, block_sizes=block_sizes, interpret=interpret, return_lse=return_lse
        )

    return without_gradient(attend, backend)(q, pages, batch, head_params)
