"""One call for a layer of a step: write new keys and values into the pages, then attend over them."""

import functools

import jax
from jaxtyping import Array, Float

from paged_kernels._src.backends.base import Backend, FittedBackend, PreparedBatch
from paged_kernels._src.backends.table import candidates, choose
from paged_kernels._src.batch import RaggedBatch
from paged_kernels._src.call import Call
from paged_kernels._src.head_params import HeadParams
from paged_kernels._src.kv_pages import KVPages
from paged_kernels._src.spec import AttentionSpec
from paged_kernels._src.validation import check_prepared_attention, check_prepared_write, check_update_inputs

Queries = Float[Array, "tokens q_heads head_dim"]
Keys = Float[Array, "tokens kv_heads head_dim"]
Values = Float[Array, "tokens kv_heads v_head_dim"]
Rows = tuple[Queries, Keys, Values | None]
Output = Float[Array, "tokens q_heads v_head_dim"]


def paged_attention_update(  # noqa: PLR0917 -- the three rows, then what `paged_attention` takes
    q: Queries,
    k: Keys,
    v: Values | None,
    pages: KVPages,
    batch: RaggedBatch | PreparedBatch,
    spec: AttentionSpec,
    head_params: HeadParams | None = None,
    *,
    backend: str | Backend | None = None,
) -> tuple[Output, KVPages]:
    """Returns the attention output, and pages that hold the batch's new keys and values.

    Equals `write_kv` followed by `paged_attention`. Donate `pages` to `jax.jit`; then nothing is copied. A layer that
    uses the keys and values of another layer calls only `paged_attention`.

    Raises:
        ValueError: see `write_kv` and `paged_attention`. Then nothing is written.
        NotImplementedError: see `write_kv` and `paged_attention`.
    """
    head_params = head_params or HeadParams()
    if isinstance(batch, PreparedBatch):
        check_prepared_write(batch, k, v, pages, backend)
        check_prepared_attention(batch, q, pages, spec=spec, head_params=head_params, backend=backend)
        return _update((q, k, v), pages, batch, head_params)
    check_update_inputs(q, k, v, pages, batch, head_params=head_params, sliding_window=spec.sliding_window)
    call = Call.of_step(q, pages, batch, spec, head_params)
    fitted = choose(candidates(backend, call.platform), call)
    return _prepare_and_update((q, k, v), pages, batch, head_params, fitted=fitted)


# Compiled as a whole, so that an eager call compiles once.
@jax.jit
def _update(rows: Rows, pages: KVPages, prepared: PreparedBatch, head_params: HeadParams) -> tuple[Output, KVPages]:
    q, k, v = rows
    pages = prepared.backend.write(pages, k, v, prepared)
    return prepared.backend.attend(q, pages, prepared, head_params, return_lse=False)[0], pages


@functools.partial(jax.jit, static_argnames=("fitted",))
def _prepare_and_update(
    rows: Rows, pages: KVPages, batch: RaggedBatch, head_params: HeadParams, *, fitted: FittedBackend
) -> tuple[Output, KVPages]:
    return _update(rows, pages, fitted.prepare(batch), head_params)
