"""One layer's attention: the step's new keys and values into the layer's pages, then attention over the pages."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from paged_attn_layer._src.attention.checks import check_call
from paged_attn_layer._src.attention.mesh import axis_size, query_axis
from paged_cache import PagedAttentionCacheView
from paged_kernels import (
    AttentionSpec,
    Backend,
    HeadParams,
    KVPages,
    PreparedBatch,
    RaggedBatch,
    paged_attention,
    prepare_batch,
    write_kv,
)

Rows = Float[Array, "*replicas tokens heads head_dim"]
LogSumExp = Float[Array, "*replicas tokens heads"]
StepBatch = RaggedBatch | PreparedBatch
"""A step's sequences, as they are or as `prepare` returns them."""


class Attended(NamedTuple):
    """What `attend` returns."""

    out: Rows
    """The output of each row, in the dtype of the queries; zeros for rows that are no token."""
    view: PagedAttentionCacheView
    """The view whose pages hold the new keys and values; the caller's own is unchanged."""
    lse: LogSumExp | None
    """The log of each row's softmax denominator, where it was asked for."""


def attend(  # noqa: PLR0917 - the three rows, then what they are attended over
    q: Rows,
    k: Rows | None,
    v: Rows | None,
    view: PagedAttentionCacheView,
    batch: StepBatch,
    spec: AttentionSpec | None = None,
    *,
    head_params: HeadParams | None = None,
    backend: str | Backend | None = None,
    return_lse: bool = False,
) -> Attended:
    """Write the step's keys and values into one layer's pages, and attend over the pages.

    Each device works on its own heads of its own replica; nothing is communicated:

                      q [replicas, tokens, q_heads, head_dim]   pages [pages, kv_heads, ...]   batch [replicas, ...]
        data_axis        replicas                                  pages                          replicas
        head_axis                          q_heads                        kv_heads                on every device

    Without a data axis, `q`, `k`, `v` and `batch` have no `replicas` axis. Query heads lie with their KV head. Query
    heads that all share one KV head, as with latent pages, are split over `"tp"`; each device has all of the pages.

    Args:
        q: the queries of this step's tokens.
        k: their new keys, or latent rows; `None` reads the pages and writes nothing.
        v: their new values; `None` with latent pages, and where `k` is `None`.
        view: one layer's pages, and how a mesh splits them (`on_mesh`).
        batch: which rows belong to which sequence. `prepare` it to share the work of a step between layers.
        spec: what to compute; `None` is causal attention without a window.
        head_params: attention sinks and ALiBi slopes, one number for each query head.
        backend: the name of the kernels' backend, or one itself; `None` takes the first that can.
        return_lse: whether to compute the log-sum-exp.

    Raises:
        ValueError: an argument does not fit the others; nothing is written.
        NotImplementedError: no backend can compute this.
    """
    spec, head_params = spec or AttentionSpec(), head_params or HeadParams()
    check_call(q, k, v, view, batch, head_params=head_params)
    if isinstance(batch, RaggedBatch):  # a prepared one was checked when it was made
        view.check_batch(batch, q.shape[-3], spec.sliding_window, writes=k is not None)
    rows, pages = (q, k, v), view.pages
    mesh = view.mesh
    if mesh is not None:  # jax.jit refuses arrays that lie on one device alone, so they are placed before it
        places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), _in_specs(view, q.shape[-2]))
        rows, pages, batch, head_params = jax.device_put((rows, pages, batch, head_params), places)
    placed = dataclasses.replace(view, pages=pages)
    out, lse, pages = _attend(rows, placed, batch, head_params, spec=spec, backend=backend, return_lse=return_lse)
    return Attended(out, dataclasses.replace(view, pages=pages), lse)


def prepare(
    batch: RaggedBatch,
    view: PagedAttentionCacheView,
    spec: AttentionSpec | None = None,
    *,
    tokens: int,
    q_heads: int,
    q_dtype: DTypeLike,
    head_params: HeadParams | None = None,
    backend: str | Backend | None = None,
) -> PreparedBatch:
    """Returns the batch with what the kernels derive from it. Make it once per step, for all layers that are alike.

    Layers are alike if they have the same page table, page shape, spec, query heads and dtype.

    Args:
        batch: which rows belong to which sequence; stacked, one for each replica, where the view has a data axis.
        view: the pages of one of the layers; only shapes are looked at.
        spec: what the layers compute.
        tokens: rows of the queries (of one replica).
        q_heads: query heads over all devices.
        q_dtype: type of the queries.
        head_params: which of them the layers have; only that is looked at.
        backend: as for `attend`.

    Raises:
        ValueError: the batch is malformed, or does not fit the pages.
        NotImplementedError: no backend can compute this.
    """
    spec, pages = spec or AttentionSpec(), local_pages(view)
    local_heads = q_heads // (1 if view.mesh is None else axis_size(view.mesh, query_axis(view, q_heads)))
    facts = StepFacts(
        spec=spec,
        tokens=tokens,
        q_heads=local_heads,
        q_dtype=jnp.dtype(q_dtype),
        backend=backend,
    )
    if view.mesh is None:
        return facts.prepare(batch, pages, head_params)
    view.check_batch(batch, tokens, spec.sliding_window)  # here, where values are known: on devices they are traced
    placed = jax.device_put(batch, NamedSharding(view.mesh, view.batch_spec))
    head_params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((local_heads,), leaf.dtype), head_params)
    shapes, shape_tree = jax.tree.flatten((view, pages, head_params))
    shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in shapes)
    return _prepare_on_mesh(placed, facts=facts, shapes=shapes, shape_tree=shape_tree)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepFacts:
    """What a step's layers have in common on one device, beside the batch and shapes."""

    spec: AttentionSpec
    tokens: int
    q_heads: int
    q_dtype: np.dtype
    backend: str | Backend | None

    def prepare(self, batch: RaggedBatch, pages: KVPages, head_params: HeadParams | None) -> PreparedBatch:
        """`prepare_batch` with these."""
        return prepare_batch(
            batch,
            pages,
            self.spec,
            tokens=self.tokens,
            q_heads=self.q_heads,
            q_dtype=self.q_dtype,
            head_params=head_params,
            backend=self.backend,
        )


# Compiled: eager code under `jax.shard_map` would compile each of its operations, again in every step.
@functools.partial(jax.jit, static_argnames=("facts", "shapes", "shape_tree"))
def _prepare_on_mesh(batch: RaggedBatch, *, facts: StepFacts, shapes, shape_tree) -> PreparedBatch:
    view, pages, head_params = jax.tree.unflatten(shape_tree, shapes)

    def prepare_part(batch: RaggedBatch) -> PreparedBatch:
        return _with_replicas(view, facts.prepare(_without_replicas(view, batch), pages, head_params))

    return _on_devices(prepare_part, view, (view.batch_spec,), view.batch_spec)(batch)


def local_pages(view: PagedAttentionCacheView) -> KVPages:
    """The shapes of one device's part of the pages."""
    if view.mesh is None:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), view.pages)
    sharding = NamedSharding(view.mesh, view.pages_spec)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(sharding.shard_shape(leaf.shape), leaf.dtype), view.pages)


# Compiled as one, so that an eager call compiles once, and does not run one operation at a time on each device.
@functools.partial(jax.jit, static_argnames=("spec", "backend", "return_lse"))
def _attend(
    rows: tuple[Rows, Rows | None, Rows | None],
    view: PagedAttentionCacheView,
    batch: StepBatch,
    head_params: HeadParams,
    *,
    spec: AttentionSpec,
    backend: str | Backend | None,
    return_lse: bool,
) -> tuple[Rows, LogSumExp | None, KVPages]:
    def attend_part(rows, pages, batch, head_params):
        rows, batch = _without_replicas(view, (rows, batch))
        if isinstance(batch, RaggedBatch):
            tokens, q_heads, _ = rows[0].shape
            batch = prepare_batch(
                batch,
                pages,
                spec,
                tokens=tokens,
                q_heads=q_heads,
                q_dtype=rows[0].dtype,
                head_params=head_params,
                backend=backend,
            )
        out, lse, pages = _write_and_attend(rows, pages, batch, head_params, spec=spec, return_lse=return_lse)
        return *_with_replicas(view, (out, lse)), pages

    if view.mesh is None:
        return attend_part(rows, view.pages, batch, head_params)
    in_specs = _in_specs(view, rows[0].shape[-2])
    q_spec = in_specs[0][0]
    out_specs = (q_spec, PartitionSpec(*q_spec[:-1]), view.pages_spec)
    return _on_devices(attend_part, view, in_specs, out_specs)(rows, view.pages, batch, head_params)


def _write_and_attend(
    rows: tuple[Rows, Rows | None, Rows | None],
    pages: KVPages,
    batch: PreparedBatch,
    head_params: HeadParams,
    *,
    spec: AttentionSpec,
    return_lse: bool,
) -> tuple[Rows, LogSumExp | None, KVPages]:
    """One device's part."""
    q, k, v = rows
    if k is not None:
        pages = write_kv(pages, k, v, batch)
    if return_lse:
        return *paged_attention(q, pages, batch, spec, head_params, return_lse=True), pages
    return paged_attention(q, pages, batch, spec, head_params), None, pages


def _on_devices(function, view: PagedAttentionCacheView, in_specs, out_specs):
    """`function` on each device's part of its arguments."""
    # The kernels' outputs carry no replication types, so shard_map cannot check them.
    return jax.shard_map(function, mesh=view.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _in_specs(view: PagedAttentionCacheView, q_heads: int) -> tuple[Any, ...]:
    """How rows (q, k, v), pages, batch and head parameters are split."""
    heads = query_axis(view, q_heads)
    q_spec = PartitionSpec(*view.rows_spec[:-2], heads, None)
    return (q_spec, view.rows_spec, view.rows_spec), view.pages_spec, view.batch_spec, PartitionSpec(heads)


def _without_replicas(view: PagedAttentionCacheView, arrays):
    """A device's part without the axis of replicas, of which it sees one."""
    return arrays if view.data_axis is None else jax.tree.map(lambda leaf: leaf[0], arrays)


def _with_replicas(view: PagedAttentionCacheView, arrays):
    """The arrays with the axis of replicas, for the output of a device's part."""
    return arrays if view.data_axis is None else jax.tree.map(lambda leaf: leaf[None], arrays)
