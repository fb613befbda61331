"""From the seed's three shapes of a step (prefill, decode, mixed) to rows and a `RaggedBatch`."""

import dataclasses

from jaxtyping import Array, Float

from paged_cache import PagedAttentionCacheView, PagedAttentionMetadata
from paged_kernels import HeadParams, RaggedBatch

CacheMetadata = PagedAttentionMetadata | RaggedBatch
"""A step's sequences: the seed's metadata, or a batch (stacked, one a replica, where the pages are split so)."""


def to_ragged(cache_metadata: CacheMetadata) -> RaggedBatch:
    """The step as a `RaggedBatch`.

    Raises:
        ValueError: it is neither a `RaggedBatch` nor a `PagedAttentionMetadata`, or is malformed.
    """
    if isinstance(cache_metadata, RaggedBatch):
        return cache_metadata
    if isinstance(cache_metadata, PagedAttentionMetadata):
        return cache_metadata.to_ragged_batch()
    raise ValueError(
        f"cache_metadata is a {type(cache_metadata).__name__}; it must be a PagedAttentionMetadata or a RaggedBatch"
    )


def to_rows(
    x: Float[Array, "*rows heads head_dim"], cache_metadata: CacheMetadata
) -> Float[Array, "*replicas tokens heads head_dim"]:
    """`x` without the seed's axis of size 1; with a `RaggedBatch` there is none."""
    return x if isinstance(cache_metadata, RaggedBatch) else x.reshape(-1, *x.shape[2:])


def check_queries(q: Array, cache_metadata: CacheMetadata, view: PagedAttentionCacheView) -> None:
    """Refuse queries that do not fit the step or the pages. Here, where shapes are whole: `shard_map` sees parts.

    Raises:
        ValueError: names what does not fit, what it is, and what it must be.
    """
    mode, lead = _mode_and_lead(cache_metadata, view)
    if q.ndim != len(lead) + 2 or any(want not in ("tokens", n) for n, want in zip(q.shape, lead, strict=False)):
        raise ValueError(f"q {q.shape} must be [{', '.join(map(str, lead))}, heads, head_dim] for {mode}")
    kv_heads, head_dim = view.pages.num_kv_heads, view.pages.head_dim
    if q.shape[-1] != head_dim or q.shape[-2] % kv_heads:
        raise ValueError(f"q {q.shape} must have a multiple of {kv_heads} heads and head_dim {head_dim}, as the pages")


def check_new_tokens(k: Array | None, v: Array | None, q: Array, view: PagedAttentionCacheView) -> None:
    """Refuse keys without values, values without keys, and either where they do not fit the queries or the pages.

    Raises:
        ValueError: names what does not fit, what it is, and what it must be.
    """
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


def check_head_params(head_params: HeadParams, q_heads: int) -> None:
    """Refuse parameters that are not one for each query head. Here, where heads are whole.

    Raises:
        ValueError: names the parameter, its shape, and what it must be.
    """
    for field in dataclasses.fields(head_params):
        value = getattr(head_params, field.name)
        if value is not None and value.shape != (q_heads,):
            raise ValueError(f"head_params.{field.name} {value.shape} must be ({q_heads},): one for each head of q")


def _mode_and_lead(cache_metadata: CacheMetadata, view: PagedAttentionCacheView) -> tuple[str, tuple[int | str, ...]]:
    """What to call the step in an error, and the axes that its queries have before `heads, head_dim`."""
    if isinstance(cache_metadata, RaggedBatch):
        return "a RaggedBatch", (*_groups(cache_metadata, view), "tokens")
    if view.data_axis is not None:
        raise ValueError(f"the cache is split over data_axis={view.data_axis!r}; give a stacked RaggedBatch")
    parts = (cache_metadata.prefill_position, cache_metadata.decodes_position)
    tokens, seqs = (0 if part is None else part.shape[0] for part in parts)
    if cache_metadata.is_prefill_mode():
        return "prefill", (1, tokens)
    return "decode" if cache_metadata.is_decode_mode() else "mixed", (tokens + seqs, 1)


def _groups(batch: RaggedBatch, view: PagedAttentionCacheView) -> tuple[int, ...]:
    """The leading axis of a stacked batch, or none, as the view has it."""
    groups = () if view.data_axis is None else (view.replicas,)
    shape = batch.page_table.shape
    if len(shape) != 2 + len(groups) or shape[: len(groups)] != groups:
        want = ", ".join([*map(str, groups), "seqs", "pages_per_seq"])
        raise ValueError(f"page_table {shape} must be [{want}] for a cache with data_axis={view.data_axis!r}")
    return groups
