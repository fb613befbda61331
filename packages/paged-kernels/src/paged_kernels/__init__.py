"""Attention over a paged KV cache for JAX: one contract, on CPU, GPU and TPU."""

from paged_kernels._version import __version__
from paged_kernels.attention.api import paged_attention
from paged_kernels.attention.merge import merge_attention_states
from paged_kernels.backends import BACKENDS, Backend, resolve_backend
from paged_kernels.batch import RaggedBatch, TokenRows, pack_tree_masks, token_rows
from paged_kernels.block_sizes import BlockSizes
from paged_kernels.compat import pallas_paged_attention, pallas_prefill_attention
from paged_kernels.heads import HeadParams
from paged_kernels.layout import KVPages
from paged_kernels.page_write.api import write_kv
from paged_kernels.row_layout import RowLayout
from paged_kernels.spec import AttentionSpec
from paged_kernels.update import paged_attention_update
from paged_kernels.validation import check_batch

__all__ = [
    "BACKENDS",
    "AttentionSpec",
    "Backend",
    "BlockSizes",
    "HeadParams",
    "KVPages",
    "RaggedBatch",
    "RowLayout",
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
