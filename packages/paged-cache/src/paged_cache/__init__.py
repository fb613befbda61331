"""A paged KV cache for JAX: pages, their pool, and the metadata of a batch."""

from paged_cache._version import __version__
from paged_cache.batching import BatchShapes, ScheduledSequence
from paged_cache.cache import PagedAttentionCache
from paged_cache.config import CacheConfig, PagedAttentionCacheMetaData
from paged_cache.metadata import PagedAttentionMetadata
from paged_cache.model_shape import ModelShape
from paged_cache.planning import Plan, plan
from paged_cache.pool import OutOfPages, PagePool
from paged_cache.prefix import Prefix
from paged_cache.sharding import MeshAxis, PartitionManager, axis_size, kv_head_axis, sharded_call
from paged_cache.step_batch import StepBatch, StepLayout, StepShape, stack_batches
from paged_cache.view import PagedAttentionCacheView

__all__ = [
    "BatchShapes",
    "CacheConfig",
    "MeshAxis",
    "ModelShape",
    "OutOfPages",
    "PagePool",
    "PagedAttentionCache",
    "PagedAttentionCacheMetaData",
    "PagedAttentionCacheView",
    "PagedAttentionMetadata",
    "PartitionManager",
    "Plan",
    "Prefix",
    "ScheduledSequence",
    "StepBatch",
    "StepLayout",
    "StepShape",
    "__version__",
    "axis_size",
    "kv_head_axis",
    "plan",
    "sharded_call",
    "stack_batches",
]
