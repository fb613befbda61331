"""Attention with its heads split over one axis of a mesh, and its groups of sequences over another."""

import dataclasses
from typing import cast

import jax
from eformer.escale import PartitionManager
from jax.core import Tracer
from jax.sharding import Mesh
from jaxtyping import Array, Float
from paged_cache import PagedAttentionCacheView, kv_head_axis, sharded_call
from paged_cache import PartitionManager as LayerTwoManager
from paged_kernels import AttentionSpec, Backend, KVPages, RaggedBatch, check_batch, paged_attention

from paged_attn_layer.mesh import AnyMesh


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


def attend(
    q: Float[Array, "*groups tokens q_heads head_dim"],
    view: PagedAttentionCacheView,
    batch: RaggedBatch,
    spec: AttentionSpec,
    *,
    backend: Backend | None = None,
) -> Float[Array, "*groups tokens q_heads head_dim"]:
    """`paged_attention`, each device attending its own heads of its own group; nothing is communicated.

                      q [groups, tokens, q_heads, head_dim]   pages [pages, kv_heads, ...]   batch [groups, ...]
        data_axis        groups                                  pages                          groups
        head_axis                        q_heads                        kv_heads                everywhere

    Without a data axis `q` and the batch have no `groups`. KV heads lie with their queries: both are split in order.

    Raises:
        ValueError: as `paged_attention`.
    """
    if view.mesh is None:
        return paged_attention(q, view.pages, batch, spec, backend=backend)
    _check_values_if_known(view, batch, q.shape[-3])

    def attend_part(q: Array, pages: KVPages, batch: RaggedBatch) -> Array:
        if view.data_axis is None:
            return paged_attention(q, pages, batch, spec, backend=backend)
        own = jax.tree.map(lambda leaf: leaf[0], batch)  # the one batch of this device's group
        return paged_attention(q[0], pages, own, spec, backend=backend)[None]

    in_specs = (view.rows_spec, view.pages_spec, view.batch_spec)
    return sharded_call(attend_part, view.mesh, in_specs, view.rows_spec, q, view.pages, batch)


def _check_values_if_known(view: PagedAttentionCacheView, batch: RaggedBatch, tokens: int) -> None:
    """Refuse lengths and page ids that do not fit: layer 1 does in eager calls, but under `shard_map` sees none."""
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(batch)):
        return
    pages = view.pages
    for group in range(view.groups):
        own = batch if view.data_axis is None else jax.tree.map(lambda leaf, g=group: leaf[g], batch)
        check_batch(own, num_pages=pages.num_pages // view.groups, page_size=pages.page_size, tokens=tokens)
