"""A paged KV cache for JAX: pages, the manager that gives them to sequences, and the arrays of a step.

More, that only some programs need, is in `paged_cache.transfer` (pages on the host, in another cache, in a file),
`paged_cache.monitoring` (what happens to pages) and `paged_cache.planning` (what fits into memory).
"""

from paged_cache._src.cache.cache import PagedAttentionCache
from paged_cache._src.cache.config import CacheConfig, PagedAttentionCacheMetaData
from paged_cache._src.cache.sharding import PartitionManager, kv_head_axis
from paged_cache._src.cache.view import PagedAttentionCacheView
from paged_cache._src.easydel import PagedAttentionMetadata
from paged_cache._src.manager import KVShape, LayerGroup, Media, OutOfPages, PageManager, PageMoves, Prompt
from paged_cache._src.spec.cache_spec import CacheSpec
from paged_cache._src.spec.hf_config import HFConfig
from paged_cache._src.step.batch_shapes import BatchShapes, ScheduledSequence
from paged_cache._src.step.step_batch import StepBatch, StepShape, stack_batches
from paged_cache._src.transfer.apply_moves import apply_moves, apply_moves_by_replica, warm_up_moves
from paged_cache._version import __version__

__all__ = [
    "BatchShapes",
    "CacheConfig",
    "CacheSpec",
    "HFConfig",
    "KVShape",
    "LayerGroup",
    "Media",
    "OutOfPages",
    "PageManager",
    "PageMoves",
    "PartitionManager",
    "Prompt",
    "ScheduledSequence",
    "StepBatch",
    "StepShape",
    "__version__",
    "apply_moves",
    "apply_moves_by_replica",
    "kv_head_axis",
    "stack_batches",
    "warm_up_moves",
]

# EasyDeL's names, with EasyDeL's meanings (README, "EasyDeL's names")
__all__ += ["PagedAttentionCache", "PagedAttentionCacheMetaData", "PagedAttentionCacheView", "PagedAttentionMetadata"]
