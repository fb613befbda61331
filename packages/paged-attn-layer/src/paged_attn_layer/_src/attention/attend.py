"""Attention with its heads split over one axis of a mesh, and its groups of sequences over another."""

import dataclasses
from functools import partial
from typing import NamedTuple, cast

import jax
from eformer.escale import PartitionManager
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from paged_attn_layer._src.attention.mesh import AnyMesh
from paged_cache import PagedAttentionCacheView, kv_head_axis, sharded_call
from paged_cache import PartitionManager as LayerTwoManager
from paged_kernels import AttentionSpec, Backend, HeadParams, KVPages, RaggedBatch, paged_attention

Rows = Float[Array, "*replicas tokens heads head_dim"]
LogSumExp = Float[Array, "*replicas tokens heads"]


class Inputs(NamedTuple):
    """The arrays of a call, as rows."""

    q: Rows
    k: Rows | None
    v: Rows | None
    view: PagedAttentionCacheView
    batch: RaggedBatch
    head_params: HeadParams


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


def place(inputs: Inputs) -> Inputs:
    """The same, laid out as the view's mesh splits them; what is in place already is not moved.

    `jax.jit` refuses arrays that are committed to one device, so in eager calls this must come before it.
    """
    q, k, v, view, batch, head_params = inputs
    if view.mesh is None:
        return inputs
    specs = (view.rows_spec, view.pages_spec, view.batch_spec, heads_spec(view))
    places = tuple(NamedSharding(view.mesh, spec) for spec in specs)
    (q, k, v), pages, batch, head_params = jax.device_put(((q, k, v), view.pages, batch, head_params), places)
    return Inputs(q, k, v, dataclasses.replace(view, pages=pages), batch, head_params)


def heads_spec(view: PagedAttentionCacheView) -> PartitionSpec:
    """How parameters `[q_heads]` are split: as the queries that they belong to."""
    return PartitionSpec(view.head_axis)


@partial(jax.jit, static_argnames=("spec", "backend"))
def write_and_attend(inputs: Inputs, *, spec: AttentionSpec, backend: str | Backend) -> tuple[Rows, LogSumExp, KVPages]:
    """The attention of each row, and the pages with `k` and `v` in them, or as they were where there is no `k`.

    Compiled by itself, so that eager calls are compiled once, and not run one operation at a time on each device.
    """
    q, k, v, view, batch, head_params = inputs
    if k is not None:
        view = view.write(k, v, batch, backend=backend)
    return *attend(q, view, batch, head_params, spec=spec, backend=backend), view.pages


def attend(
    q: Rows,
    view: PagedAttentionCacheView,
    batch: RaggedBatch,
    head_params: HeadParams,
    *,
    spec: AttentionSpec,
    backend: str | Backend,
) -> tuple[Rows, LogSumExp]:
    """`paged_attention`, each device attending its own heads of its own group; nothing is communicated.

                      q [groups, tokens, q_heads, head_dim]   pages [pages, kv_heads, ...]   batch [groups, ...]
        data_axis        groups                                  pages                          groups
        head_axis                        q_heads                        kv_heads                everywhere

    Without a data axis `q` and the batch have no `groups`. KV heads lie with their queries: both are split in order,
    and so are the parameters of the query heads, which every group shares.
    """
    if view.mesh is None:
        return paged_attention(q, view.pages, batch, spec, head_params, backend=backend, return_lse=True)

    def attend_part(q: Array, pages: KVPages, batch: RaggedBatch, head_params: HeadParams) -> tuple[Array, Array]:
        if view.data_axis is not None:  # each device sees the one batch of its group
            q, batch = jax.tree.map(lambda leaf: leaf[0], (q, batch))
        results = paged_attention(q, pages, batch, spec, head_params, backend=backend, return_lse=True)
        return results if view.data_axis is None else jax.tree.map(lambda leaf: leaf[None], results)

    in_specs = (view.rows_spec, view.pages_spec, view.batch_spec, heads_spec(view))
    out_specs = (view.rows_spec, PartitionSpec(*view.rows_spec[:-1]))
    return sharded_call(attend_part, view.mesh, in_specs, out_specs, q, view.pages, batch, head_params)
