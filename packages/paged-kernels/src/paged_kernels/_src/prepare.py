"""The public call that prepares a batch: what all layers of a step share is computed once."""

import functools

import jax
from jax.typing import DTypeLike

from paged_kernels._src.backends.base import Backend, FittedBackend, PreparedBatch
from paged_kernels._src.backends.table import candidates, choose
from paged_kernels._src.batch import RaggedBatch
from paged_kernels._src.call import Call
from paged_kernels._src.head_params import HeadParams
from paged_kernels._src.kv_pages import KVPages
from paged_kernels._src.spec import AttentionSpec
from paged_kernels._src.validation import check_attention_inputs


def prepare_batch(
    batch: RaggedBatch,
    pages: KVPages,
    spec: AttentionSpec,
    *,
    tokens: int,
    q_heads: int,
    q_dtype: DTypeLike,
    head_params: HeadParams | None = None,
    backend: str | Backend | None = None,
) -> PreparedBatch:
    """Returns the batch with what all layers of a step share, computed once.

    `write_kv` and `paged_attention` take it as their batch. Each layer that uses it must have queries, pages, a spec
    and head parameters like those given here. Shapes, types and which head parameters are given must agree; values may
    differ. Layers that differ need a prepared batch each. Under `jax.shard_map` the shapes are those of one device.

    No two rows may have the same slot, since `write_kv` may be given the result. A batch that is only read, with rows
    that share slots (cross-attention of forked sequences), has `q_starts`.

    Args:
        batch: the step's sequences.
        pages: one layer's pages, or only their shapes (`KVPages.shapes`).
        spec: the attention of the layers.
        tokens: the number of rows of q, k and v.
        q_heads: the number of query heads.
        q_dtype: the type of q.
        head_params: the parameters of one layer's query heads, or their shapes.
        backend: a name, a `Backend`, or `None` for the platform's first backend that can take the call.

    Raises:
        ValueError: an argument does not fit the others, or the backend cannot run here.
        NotImplementedError: the backend does not have what the call asks for. The message says why.
    """
    head_params = head_params or HeadParams()
    q = jax.ShapeDtypeStruct((tokens, q_heads, pages.head_dim), q_dtype)
    check_attention_inputs(q, pages, batch, head_params, spec.sliding_window, writes=True)
    call = Call.of_step(q, pages, batch, spec, head_params)
    return _prepare(batch, fitted=choose(candidates(backend, call.platform), call))


@functools.partial(jax.jit, static_argnames=("fitted",))  # as a whole, so that an eager call compiles once
def _prepare(batch: RaggedBatch, *, fitted: FittedBackend) -> PreparedBatch:
    return fitted.prepare(batch)
