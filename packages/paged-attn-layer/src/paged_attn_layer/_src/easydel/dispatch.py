"""From EasyDeL's three shapes of a step (prefill, decode, mixed) to rows and a `RaggedBatch`."""

from jaxtyping import Array, Float

from paged_attn_layer._src.attention.checks import check_queries
from paged_cache import PagedAttentionCacheView, PagedAttentionMetadata
from paged_kernels import RaggedBatch

StepMetadata = PagedAttentionMetadata | RaggedBatch
"""A step's sequences: EasyDeL's metadata, or a batch (stacked, one for each replica, where the pages are split so)."""


def to_ragged(q: Array, cache_metadata: StepMetadata, view: PagedAttentionCacheView) -> RaggedBatch:
    """Returns the step as a `RaggedBatch`, once `q` has the shape that such a step has.

    Raises:
        ValueError: `cache_metadata` is of another type or malformed, or `q` does not fit it.
    """
    if isinstance(cache_metadata, RaggedBatch):
        return cache_metadata
    if not isinstance(cache_metadata, PagedAttentionMetadata):
        raise ValueError(
            f"cache_metadata is a {type(cache_metadata).__name__}; it must be a PagedAttentionMetadata or a RaggedBatch"
        )
    if view.data_axis is not None:
        raise ValueError(f"the cache is split over data_axis={view.data_axis!r}; give a stacked RaggedBatch")
    step, lead = _step_and_lead(cache_metadata)
    check_queries(q, lead, view, step)
    return cache_metadata.to_ragged_batch()


def to_rows(
    x: Float[Array, "*rows heads head_dim"], cache_metadata: StepMetadata
) -> Float[Array, "*replicas tokens heads head_dim"]:
    """Returns `x` without EasyDeL's axis of size 1; a `RaggedBatch` has none."""
    return x if isinstance(cache_metadata, RaggedBatch) else x.reshape(-1, *x.shape[2:])


def _step_and_lead(metadata: PagedAttentionMetadata) -> tuple[str, tuple[int, ...]]:
    """The kind of step, and the axes that its queries have before `heads, head_dim`."""
    parts = (metadata.prefill_position, metadata.decodes_position)
    tokens, seqs = (0 if part is None else part.shape[0] for part in parts)
    if metadata.is_prefill_mode():
        return "prefill", (1, tokens)
    return "decode" if metadata.is_decode_mode() else "mixed", (tokens + seqs, 1)
