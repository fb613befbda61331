"""A paged KV cache for JAX: pages, their pool, and the metadata of a batch."""

from paged_cache._version import __version__
from paged_cache.batching import BatchShapes, ScheduledSequence
from paged_cache.cache import PagedAttentionCache
from paged_cache.config import CacheConfig, PagedAttentionCacheMetaData
from paged_cache.device import apply_moves, apply_moves_by_group, warm_up_moves
from paged_cache.history import PageHistory
from paged_cache.host import HostPages
from paged_cache.manager import (
    EventKind,
    KeptPage,
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
from paged_cache.metadata import PagedAttentionMetadata
from paged_cache.model_shape import ModelShape
from paged_cache.planning import Plan, plan
from paged_cache.sharding import MeshAxis, PartitionManager, axis_size, kv_head_axis, sharded_call
from paged_cache.snapshot import load_prefix_cache, save_prefix_cache
from paged_cache.step_batch import StepBatch, StepLayout, StepShape, stack_batches
from paged_cache.transfer import SequencePages, export_sequence, import_sequence
from paged_cache.view import PagedAttentionCacheView

__all__ = [
    "BatchShapes",
    "CacheConfig",
    "EventKind",
    "HostPages",
    "KeptPage",
    "LayerGroup",
    "Media",
    "MeshAxis",
    "ModelShape",
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
    "apply_moves_by_group",
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
