"""The one call that writes pages."""

import functools

import jax
from jaxtyping import Array, Float

from paged_kernels._src.backends import Backend, resolve_backend, without_gradient
from paged_kernels._src.batch import RaggedBatch
from paged_kernels._src.kv_pages import KVPages
from paged_kernels._src.page_write.tpu import write_kv_tpu
from paged_kernels._src.page_write.xla import write_kv_xla
from paged_kernels._src.validation import check_write_inputs


def write_kv(
    pages: KVPages,
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads v_head_dim"] | None,
    batch: RaggedBatch,
    *,
    backend: Backend | None = None,
) -> KVPages:
    """Pages that hold the batch's new keys and values, each at its token's position; all else is unchanged.

    Row `r` of sequence `i` at position `p` goes to slot `p % page_size` of page `page_table[i, p // page_size]`,
    rounded to the pages' dtype; for types with scales, each row of K and of V gets a scale of its own (`KVLayout`).
    Padding, gaps and rows for the null page are not written. Donate `pages` to `jax.jit` and nothing is copied.

    Args:
        pages: one layer's pages.
        k: the new keys, or of latent pages the new latent rows.
        v: the new values; `None` for latent pages, whose values are in their keys.
        batch: where the rows go; its rows must be the newest tokens (no `q_starts`).
        backend: `None` picks by platform.

    Raises:
        ValueError: an argument does not fit the others, or the backend cannot run here.
        NotImplementedError: the backend does not have what the arguments ask for, or a gradient is taken through one
            that has none; says what does.
    """
    check_write_inputs(k, v, pages, batch)
    return _write(pages, k, v, batch, backend=resolve_backend(backend))


@functools.partial(jax.jit, static_argnames=("backend",))  # so that eager calls compile once
def _write(
    pages: KVPages,
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads v_head_dim"] | None,
    batch: RaggedBatch,
    *,
    backend: Backend,
) -> KVPages:
    if backend in ("reference", "xla"):
        return write_kv_xla(pages, k, v, batch)
    write = functools.partial(write_kv_tpu, interpret=backend == "tpu_interpret")
    return without_gradient(write, backend)(pages, k, v, batch)
