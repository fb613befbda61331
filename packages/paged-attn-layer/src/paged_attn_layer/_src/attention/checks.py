"""Shapes of an attention call are checked here, where they are whole: under `shard_map` each device sees a part."""

import dataclasses

from jaxtyping import Array

from paged_cache import PagedAttentionCacheView
from paged_kernels import HeadParams, PreparedBatch, RaggedBatch


def check_call(
    q: Array,
    k: Array | None,
    v: Array | None,
    view: PagedAttentionCacheView,
    batch: RaggedBatch | PreparedBatch,
    *,
    head_params: HeadParams,
) -> None:
    """Refuse arrays that do not fit each other, and pages that were donated to an earlier call.

    Raises:
        ValueError: names what does not fit, what it is, and what it must be.
    """
    view.pages.check_not_donated("view.pages")
    ragged = batch if isinstance(batch, RaggedBatch) else batch.batch
    lead = (*_check_replicas(ragged, view), "tokens")
    check_queries(q, lead, view, "a RaggedBatch")
    _check_new_tokens(k, v, q, view)
    _check_head_params(head_params, q.shape[-2])


def check_queries(q: Array, lead: tuple[int | str, ...], view: PagedAttentionCacheView, step: str) -> None:
    """Refuse queries that do not have these leading axes ("tokens" is any number), or do not fit the pages.

    Raises:
        ValueError: says what they are and what they must be for this kind of step.
    """
    if q.ndim != len(lead) + 2 or any(want not in ("tokens", n) for n, want in zip(q.shape, lead, strict=False)):
        raise ValueError(f"q {q.shape} must be [{', '.join(map(str, lead))}, heads, head_dim] for {step}")
    kv_heads, head_dim = view.pages.num_kv_heads, view.pages.head_dim
    if q.shape[-1] != head_dim or q.shape[-2] % kv_heads:
        raise ValueError(f"q {q.shape} must have a multiple of {kv_heads} heads and head_dim {head_dim}, as the pages")


def _check_new_tokens(k: Array | None, v: Array | None, q: Array, view: PagedAttentionCacheView) -> None:
    """Refuse keys without values, values without keys, and either where they do not fit the queries or the pages."""
    pages = view.pages
    if pages.layout.latent and v is not None:
        raise ValueError("v must be None for latent pages, whose values are in their keys")
    if not pages.layout.latent and (k is None) != (v is None):
        missing, given = ("k", "v") if k is None else ("v", "k")
        raise ValueError(f"{missing} is None but {given} is not; give both to write them, or neither to read only")
    for name, rows, dim in (("k", k, pages.head_dim), ("v", v, pages.v_head_dim)):
        want = (*q.shape[:-2], pages.num_kv_heads, dim)
        if rows is not None and rows.shape != want:
            raise ValueError(f"{name} {rows.shape} must be {want}: the rows of q, and heads and head_dim of the pages")


def _check_head_params(head_params: HeadParams, q_heads: int) -> None:
    for field in dataclasses.fields(head_params):
        value = getattr(head_params, field.name)
        if value is not None and value.shape != (q_heads,):
            raise ValueError(f"head_params.{field.name} {value.shape} must be ({q_heads},): one for each head of q")


def _check_replicas(batch: RaggedBatch, view: PagedAttentionCacheView) -> tuple[int, ...]:
    """The leading axis of a stacked batch, or none, as the view has it."""
    replicas = () if view.data_axis is None else (view.replicas,)
    shape = batch.page_table.shape
    if len(shape) != 2 + len(replicas) or shape[: len(replicas)] != replicas:
        want = ", ".join([*map(str, replicas), "seqs", "pages_per_seq"])
        raise ValueError(f"page_table {shape} must be [{want}] for a cache with data_axis={view.data_axis!r}")
    return replicas
