"""Attention over a paged KV cache for JAX: one contract, on CPU, GPU and TPU."""

from paged_kernels._src.attention.api import paged_attention
from paged_kernels._src.attention.merge import merge_attention_states
from paged_kernels._src.backends import BACKENDS, Backend, resolve_backend
from paged_kernels._src.batch import RaggedBatch, TokenRows, pack_tree_masks, token_rows
from paged_kernels._src.block_sizes import BlockSizes
from paged_kernels._src.easydel import pallas_paged_attention, pallas_prefill_attention
from paged_kernels._src.head_params import HeadParams
from paged_kernels._src.kv_layout import KVLayout
from paged_kernels._src.kv_pages import KVPages
from paged_kernels._src.page_write.api import write_kv
from paged_kernels._src.spec import AttentionSpec
from paged_kernels._src.update import paged_attention_update
from paged_kernels._src.validation import check_batch
from paged_kernels._version import __version__

__all__ = [
    "BACKENDS",
    "AttentionSpec",
    "Backend",
    "BlockSizes",
    "HeadParams",
    "KVLayout",
    "KVPages",
    "RaggedBatch",
    "TokenRows",
    "__version__",
    "check_batch",
    "merge_attention_states",
    "pack_tree_masks",
    "paged_attention",
    "paged_attention_update",
    "pallas_paged_attention",
    "pallas_prefill_attention",
    "resolve_backend",
    "token_rows",
    "write_kv",
]
