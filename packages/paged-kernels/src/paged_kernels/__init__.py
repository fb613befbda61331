"""Attention over a paged KV cache for JAX: the same calls on CPU, GPU and TPU."""

from paged_kernels._src.attention.api import paged_attention
from paged_kernels._src.attention.merge import merge_attention_states
from paged_kernels._src.backends.base import Backend, PreparedBatch
from paged_kernels._src.backends.explain import explain_backends
from paged_kernels._src.backends.table import get_backend
from paged_kernels._src.batch import RaggedBatch, pack_tree_masks
from paged_kernels._src.easydel import pallas_paged_attention, pallas_prefill_attention
from paged_kernels._src.head_params import HeadParams
from paged_kernels._src.kv_layout import KVLayout
from paged_kernels._src.kv_pages import KVPages
from paged_kernels._src.page_write.api import write_kv
from paged_kernels._src.prepare import prepare_batch
from paged_kernels._src.spec import AttentionSpec
from paged_kernels._src.update import paged_attention_update
from paged_kernels._src.validation import check_batch
from paged_kernels._version import __version__

__all__ = [
    "AttentionSpec",
    "Backend",
    "HeadParams",
    "KVLayout",
    "KVPages",
    "PreparedBatch",
    "RaggedBatch",
    "__version__",
    "check_batch",
    "explain_backends",
    "get_backend",
    "merge_attention_states",
    "pack_tree_masks",
    "paged_attention",
    "paged_attention_update",
    "prepare_batch",
    "write_kv",
]
# EasyDeL's names, for code that uses them:
__all__ += ["pallas_paged_attention", "pallas_prefill_attention"]
