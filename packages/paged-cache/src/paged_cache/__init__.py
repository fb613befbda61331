"""A paged KV cache for JAX: pages, their pool, and the metadata of a batch."""

from paged_cache._src.cache.cache import PagedAttentionCache
from paged_cache._src.cache.config import CacheConfig, PagedAttentionCacheMetaData
from paged_cache._src.cache.sharding import MeshAxis, PartitionManager, axis_size, kv_head_axis, sharded_call
from paged_cache._src.cache.view import PagedAttentionCacheView
from paged_cache._src.easydel import PagedAttentionMetadata
from paged_cache._src.manager import (
    CachedPage,
    EventKind,
    LayerGroup,
    Media,
    OutOfPages,
    PageEvent,
    PageManager,
    PageMoves,
    PagePool,
    PageStats,
    Pin,
    Prompt,
    Subscriber,
)
from paged_cache._src.monitoring.history import PageHistory
from paged_cache._src.planning.cache_spec import CacheSpec
from paged_cache._src.planning.plan import Plan, plan
from paged_cache._src.step.batch_shapes import BatchShapes, ScheduledSequence
from paged_cache._src.step.step_batch import StepBatch, StepLayout, StepShape, stack_batches
from paged_cache._src.transfer.apply_moves import apply_moves, apply_moves_by_replica, warm_up_moves
from paged_cache._src.transfer.host_pages import HostPages
from paged_cache._src.transfer.prefix_file import load_prefix_cache, save_prefix_cache
from paged_cache._src.transfer.sequence_pages import SequencePages, export_sequence, import_sequence
from paged_cache._version import __version__

__all__ = [
    "BatchShapes",
    "CacheConfig",
    "CacheSpec",
    "CachedPage",
    "EventKind",
    "HostPages",
    "LayerGroup",
    "Media",
    "MeshAxis",
    "OutOfPages",
    "PageEvent",
    "PageHistory",
    "PageManager",
    "PageMoves",
    "PagePool",
    "PageStats",
    "PagedAttentionCache",
    "PagedAttentionCacheMetaData",
    "PagedAttentionCacheView",
    "PagedAttentionMetadata",
    "PartitionManager",
    "Pin",
    "Plan",
    "Prompt",
    "ScheduledSequence",
    "SequencePages",
    "StepBatch",
    "StepLayout",
    "StepShape",
    "Subscriber",
    "__version__",
    "apply_moves",
    "apply_moves_by_replica",
    "axis_size",
    "export_sequence",
    "import_sequence",
    "kv_head_axis",
    "load_prefix_cache",
    "plan",
    "save_prefix_cache",
    "sharded_call",
    "stack_batches",
    "warm_up_moves",
]
