"""Attention with its heads split over one axis of a mesh, and its groups of sequences over another."""

import dataclasses
from functools import partial
from typing import cast

import jax
from eformer.escale import PartitionManager
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float

from paged_attn_layer.mesh import AnyMesh
from paged_cache import PagedAttentionCacheView, kv_head_axis, sharded_call
from paged_cache import PartitionManager as LayerTwoManager
from paged_kernels import AttentionSpec, Backend, KVPages, RaggedBatch, paged_attention

Rows = Float[Array, "*groups tokens heads head_dim"]


def view_on_mesh(
    view: PagedAttentionCacheView, mesh: AnyMesh | None, partition_manager: PartitionManager | None
) -> PagedAttentionCacheView:
    """The view as the mesh splits it: its own split if it has one, else by KV heads where they divide.

    So that pages of a single device work on any mesh, with the write and the read split alike.
    """
    if mesh is None:
        return view
    concrete = cast(Mesh, mesh)  # or an AbstractMesh within jax.jit, where one will do
    if view.mesh is not None:
        return dataclasses.replace(view, mesh=concrete)
    manager = cast(LayerTwoManager | None, partition_manager)  # eformer types its modes more narrowly than str
    head_axis = kv_head_axis(concrete, view.pages.num_kv_heads, manager)
    return dataclasses.replace(view, mesh=concrete, head_axis=head_axis)


def place(
    q: Rows, k: Rows | None, v: Rows | None, view: PagedAttentionCacheView, batch: RaggedBatch
) -> tuple[Rows, Rows | None, Rows | None, PagedAttentionCacheView, RaggedBatch]:
    """The same, laid out as the view's mesh splits them; what is in place already is not moved.

    `jax.jit` refuses arrays that are committed to one device, so in eager calls this must come before it.
    """
    if view.mesh is None:
        return q, k, v, view, batch
    rows, pages, whole = (NamedSharding(view.mesh, spec) for spec in (view.rows_spec, view.pages_spec, view.batch_spec))
    q, k, v = jax.device_put((q, k, v), rows)
    return q, k, v, dataclasses.replace(view, pages=jax.device_put(view.pages, pages)), jax.device_put(batch, whole)


@partial(jax.jit, static_argnames=("spec", "backend"))
def write_and_attend(
    q: Rows,
    k: Rows | None,
    v: Rows | None,
    view: PagedAttentionCacheView,
    batch: RaggedBatch,
    *,
    spec: AttentionSpec,
    backend: Backend,
) -> tuple[Rows, KVPages]:
    """The attention of each row, and the pages with `k` and `v` in them, or as they were where both are `None`.

    Compiled by itself, so that eager calls are compiled once, and not run one operation at a time on each device.
    """
    if k is not None and v is not None:
        view = view.write(k, v, batch, backend=backend)
    return attend(q, view, batch, spec, backend=backend), view.pages


def attend(
    q: Rows, view: PagedAttentionCacheView, batch: RaggedBatch, spec: AttentionSpec, *, backend: Backend
) -> Rows:
    """`paged_attention`, each device attending its own heads of its own group; nothing is communicated.

                      q [groups, tokens, q_heads, head_dim]   pages [pages, kv_heads, ...]   batch [groups, ...]
        data_axis        groups                                  pages                          groups
        head_axis                        q_heads                        kv_heads                everywhere

    Without a data axis `q` and the batch have no `groups`. KV heads lie with their queries: both are split in order.
    """
    if view.mesh is None:
        return paged_attention(q, view.pages, batch, spec, backend=backend)

    def attend_part(q: Array, pages: KVPages, batch: RaggedBatch) -> Array:
        if view.data_axis is None:
            return paged_attention(q, pages, batch, spec, backend=backend)
        own = jax.tree.map(lambda leaf: leaf[0], batch)  # the one batch of this device's group
        return paged_attention(q[0], pages, own, spec, backend=backend)[None]

    in_specs = (view.rows_spec, view.pages_spec, view.batch_spec)
    return sharded_call(attend_part, view.mesh, in_specs, view.rows_spec, q, view.pages, batch)
