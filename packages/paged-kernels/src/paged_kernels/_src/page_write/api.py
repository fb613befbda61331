"""The call that writes pages."""

import functools

import jax
from jaxtyping import Array, Float

from paged_kernels._src.backends.base import Backend, FittedBackend, PreparedBatch
from paged_kernels._src.backends.table import candidates, choose
from paged_kernels._src.batch import RaggedBatch
from paged_kernels._src.call import Call
from paged_kernels._src.kv_pages import KVPages
from paged_kernels._src.validation import check_prepared_write, check_write_inputs

Keys = Float[Array, "tokens kv_heads head_dim"]
Values = Float[Array, "tokens kv_heads v_head_dim"]


def write_kv(
    pages: KVPages,
    k: Keys,
    v: Values | None,
    batch: RaggedBatch | PreparedBatch,
    *,
    backend: str | Backend | None = None,
) -> KVPages:
    """Returns pages with the batch's new keys and values, each at its token's position.

    All else is unchanged.

    Row `r` of sequence `i` at position `p` goes to slot `p % page_size` of page `page_table[i, p // page_size]`,
    rounded to the pages' dtype. In types with scales, each key and each value gets its own scale (`KVLayout`). Padding,
    gaps, and rows for the null page are not written. Donate `pages` to `jax.jit`; then nothing is copied.

    Args:
        pages: one layer's pages.
        k: the new keys; for latent pages the new latent vectors.
        v: the new values; `None` for latent pages, whose values are part of their keys.
        batch: the sequences, whose rows must be the newest tokens (no `q_starts`); or a prepared batch
            (`prepare_batch`).
        backend: a name, a `Backend`, or `None` for the platform's first backend that can take the call. A prepared
            batch has its own.

    Raises:
        ValueError: an argument does not fit the others or the prepared batch, or the backend cannot run here.
        NotImplementedError: the backend does not have what the call asks for, or a gradient is taken and it has none.
            The message says what has it.
    """
    if isinstance(batch, PreparedBatch):
        check_prepared_write(batch, k, v, pages, backend)
        return _write(pages, k, v, batch)
    check_write_inputs(k, v, pages, batch)
    call = Call.of_write(k.shape[0], pages, batch)
    return _prepare_and_write(pages, k, v, batch, fitted=choose(candidates(backend, call.platform), call))


# Compiled as a whole, so that an eager call compiles once.
@jax.jit
def _write(pages: KVPages, k: Keys, v: Values | None, prepared: PreparedBatch) -> KVPages:
    return prepared.backend.write(pages, k, v, prepared)


@functools.partial(jax.jit, static_argnames=("fitted",))
def _prepare_and_write(
    pages: KVPages, k: Keys, v: Values | None, batch: RaggedBatch, *, fitted: FittedBackend
) -> KVPages:
    return fitted.backend.write(pages, k, v, fitted.prepare(batch))
