"""The calls of the compiled library, as functions of arrays."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from paged_kernels._src.attention.block_sizes import BlockSizes
from paged_kernels._src.batch import RaggedBatch
from paged_kernels._src.cpu.library import ATTENTION, WRITE
from paged_kernels._src.head_params import HeadParams
from paged_kernels._src.kv_layout import KVLayout
from paged_kernels._src.kv_pages import KVPages
from paged_kernels._src.spec import AttentionSpec


def attend(
    q: Float[Array, "tokens q_heads head_dim"],
    pages: KVPages,
    batch: RaggedBatch,
    head_params: HeadParams,
    *,
    spec: AttentionSpec,
    return_lse: bool,
    block_sizes: BlockSizes | None = None,
    target: str | None = None,
) -> tuple[Float[Array, "tokens q_heads v_head_dim"], Float[Array, "tokens q_heads"] | None]:
    """Returns the output in `q.dtype`, and the log-sum-exp of each row, or `None` if it is not asked for.

    Without block sizes the library chooses them. `target` is one of `library.targets()`; `None` is the best.
    """
    out_shape, lse_shape = (*q.shape[:2], pages.v_head_dim), q.shape[:2] if return_lse else (0, 0)
    arrays = _varying_alike(
        q,
        pages.data,
        _or_absent(pages.scales, (0, 0, 0, 0), jnp.float32),
        batch.page_table,
        batch.kv_lens,
        batch.cu_q_lens,
        batch.num_seqs,
        _or_absent(batch.q_starts, (0,), jnp.int32),
        _or_absent(batch.tree_mask, (0, 0), jnp.int32),
        _or_absent(head_params.sinks, (0,), jnp.float32),
        _or_absent(head_params.alibi_slopes, (0,), jnp.float32),
    )
    results = _results(arrays, (out_shape, q.dtype), (lse_shape, jnp.dtype(jnp.float32)))
    out, lse = jax.ffi.ffi_call(ATTENTION, results)(
        *arrays,
        **_layout_attributes(pages.layout),
        softmax_scale=np.float32(spec.resolved_scale(pages.head_dim)),
        soft_cap=np.float32(spec.soft_cap or 0),
        sliding_window=np.int64(spec.sliding_window or 0),
        causal=spec.causal,
        q_rows=np.int64(block_sizes.q_rows if block_sizes else 0),
        chunk_keys=np.int64(block_sizes.kv_pages * pages.page_size if block_sizes else 0),
        target=target or "",
    )
    return out, lse if return_lse else None


def write(
    pages: KVPages,
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads v_head_dim"] | None,
    page_ids: Int32[Array, " tokens"],
    slots: Int32[Array, " tokens"],
) -> KVPages:
    """Returns pages with each row in its slot, in the buffers of `pages`. Rows for page 0 are dropped."""
    scales = _or_absent(pages.scales, (0, 0, 0, 0), jnp.float32)
    arrays = _varying_alike(pages.data, scales, k, _or_absent(v, (0, 0, 0), k.dtype), page_ids, slots)
    results = _results(arrays, *((each.shape, each.dtype) for each in (pages.data, scales)))
    write_in_place = jax.ffi.ffi_call(WRITE, results, input_output_aliases={0: 0, 1: 1})
    data, scales = write_in_place(*arrays, **_layout_attributes(pages.layout))
    return dataclasses.replace(pages, data=data, scales=None if pages.scales is None else scales)


def _or_absent(array: Array | None, shape: tuple[int, ...], dtype: Any) -> Array:
    """Returns the array as `dtype`, or an empty one of this shape, which stands for none."""
    return jnp.zeros(shape, dtype) if array is None else array.astype(dtype)


def _layout_attributes(layout: KVLayout) -> dict[str, Any]:
    return {
        "k_dim": np.int64(layout.k_dim),
        "v_dim": np.int64(layout.v_dim),
        "v_start": np.int64(layout.v_start),
        "latent": layout.latent,
        "int4": layout.dtype == "int4",
    }


def _results(arrays: tuple[Array, ...], *shapes: tuple[tuple[int, ...], np.dtype]) -> list[jax.ShapeDtypeStruct]:
    """Returns the results of a call, which vary over the mesh axes over which its arguments vary."""
    varying = jax.typeof(arrays[0]).manual_axis_type
    if not varying.varying:
        return [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    whole = jax.NamedSharding(jax.sharding.get_abstract_mesh(), jax.sharding.PartitionSpec())
    return [jax.ShapeDtypeStruct(*shape, sharding=whole, manual_axis_type=varying) for shape in shapes]


def _varying_alike(*arrays: Array) -> tuple[Array, ...]:
    """Returns the arrays, which under `jax.shard_map` then all vary over each mesh axis over which one does."""
    axes = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    union = frozenset[str]().union(*axes)
    return tuple(
        jax.lax.pcast(array, tuple(union - own), to="varying") if union - own else array
        for array, own in zip(arrays, axes, strict=True)
    )
