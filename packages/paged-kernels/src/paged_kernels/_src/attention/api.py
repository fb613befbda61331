"""The call for attention over pages."""

import functools
from collections.abc import Iterable
from typing import Any, Literal, overload

import jax
from jaxtyping import Array, Float

from paged_kernels._src.backends.base import Backend, FittedBackend, PreparedBatch
from paged_kernels._src.backends.table import candidates, choose
from paged_kernels._src.batch import RaggedBatch
from paged_kernels._src.call import Call
from paged_kernels._src.device import current_platform
from paged_kernels._src.head_params import HeadParams
from paged_kernels._src.kv_pages import KVPages
from paged_kernels._src.spec import AttentionSpec
from paged_kernels._src.validation import check_attention_inputs, check_prepared_attention

Queries = Float[Array, "tokens q_heads head_dim"]
Output = Float[Array, "tokens q_heads v_head_dim"]
LogSumExp = Float[Array, "tokens q_heads"]


@overload
def paged_attention(
    q: Queries,
    pages: KVPages,
    batch: RaggedBatch | PreparedBatch,
    spec: AttentionSpec,
    head_params: HeadParams | None = None,
    *,
    backend: str | Backend | None = None,
    return_lse: Literal[False] = False,
) -> Output: ...
@overload
def paged_attention(
    q: Queries,
    pages: KVPages,
    batch: RaggedBatch | PreparedBatch,
    spec: AttentionSpec,
    head_params: HeadParams | None = None,
    *,
    backend: str | Backend | None = None,
    return_lse: Literal[True],
) -> tuple[Output, LogSumExp]: ...
def paged_attention(
    q: Queries,
    pages: KVPages,
    batch: RaggedBatch | PreparedBatch,
    spec: AttentionSpec,
    head_params: HeadParams | None = None,
    *,
    backend: str | Backend | None = None,
    return_lse: bool = False,
) -> Output | tuple[Output, LogSumExp]:
    """Returns the attention of each query row over the pages of its sequence, in `q.dtype`.

    `out[t, h] = sum_p softmax_p(s(t, p)) v[p, h // q_per_kv]`, with `q_per_kv = q_heads / kv_heads`. `AttentionSpec`,
    `HeadParams` and the batch's tree mask define the logits `s` and the visible keys. The batch may mix prefill,
    decode, multi-token decode and idle sequences. Rows that are not tokens give zeros.

    Args:
        q: the queries, float32, bfloat16 or float16.
        pages: one layer's keys and values. Those of the batch's own tokens must be in them (`write_kv`).
        batch: the sequences, with their rows and pages; or a prepared batch (`prepare_batch`).
        spec: scale, masks and cap.
        head_params: sinks and ALiBi slopes of the query heads.
        backend: a name, a `Backend`, or `None` for the platform's first backend that can take the call
            (`explain_backends`). A prepared batch has its own.
        return_lse: True to return also the log of the softmax denominator, `log sum_p exp(s(t, p))` (with the sink),
        `[tokens, q_heads]`; -inf if there is nothing to sum. It is float32, or float64 from `reference` with float64.
            `merge_attention_states` uses it to merge outputs over different keys.

    Raises:
        ValueError: an argument does not fit the others or the prepared batch, or the backend cannot run here.
        NotImplementedError: the backend does not have what the call asks for, or a gradient is taken and it has none.
            The message says what has it.
    """
    head_params = head_params or HeadParams()
    if isinstance(batch, PreparedBatch):
        check_prepared_attention(batch, q, pages, spec=spec, head_params=head_params, backend=backend)
        out, lse = _attend(q, pages, batch, head_params, return_lse=return_lse)
    else:
        backends = candidates(backend, current_platform())
        out, lse = attend_batch(q, pages, batch, spec, head_params, backends=backends, return_lse=return_lse)
    return (out, lse) if return_lse else out


def attend_batch(
    q: Queries,
    pages: KVPages,
    batch: RaggedBatch,
    spec: AttentionSpec,
    head_params: HeadParams,
    *,
    backends: Iterable[Backend],
    return_lse: bool = False,
) -> tuple[Output, Any]:
    """Check the arguments, and return the attention by the first of these backends that can take the call."""
    check_attention_inputs(q, pages, batch, head_params, spec.sliding_window)
    fitted = choose(backends, Call.of_attention(q, pages, batch, spec, head_params))
    return _prepare_and_attend(q, pages, batch, head_params, fitted=fitted, return_lse=return_lse)


# Compiled as a whole, so that an eager call compiles once.
@functools.partial(jax.jit, static_argnames=("return_lse",))
def _attend(
    q: Queries, pages: KVPages, prepared: PreparedBatch, head_params: HeadParams, *, return_lse: bool
) -> tuple[Output, LogSumExp | None]:
    return prepared.backend.attend(q, pages, prepared, head_params, return_lse=return_lse)


@functools.partial(jax.jit, static_argnames=("fitted", "return_lse"))
def _prepare_and_attend(
    q: Queries, pages: KVPages, batch: RaggedBatch, head_params: HeadParams, *, fitted: FittedBackend, return_lse: bool
) -> tuple[Output, LogSumExp | None]:
    return fitted.backend.attend(q, pages, fitted.prepare(batch), head_params, return_lse=return_lse)
