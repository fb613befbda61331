"""Attention over a paged KV cache for JAX: one contract, on CPU, GPU and TPU."""

from paged_kernels._version import __version__
from paged_kernels.attention.api import paged_attention
from paged_kernels.backends import BACKENDS, Backend, resolve_backend
from paged_kernels.batch import RaggedBatch, TokenRows, token_rows
from paged_kernels.block_sizes import BlockSizes
from paged_kernels.compat import pallas_paged_attention, pallas_prefill_attention
from paged_kernels.layout import KVPages
from paged_kernels.page_write.api import write_kv
from paged_kernels.spec import AttentionSpec
from paged_kernels.validation import check_batch

__all__ = [
    "BACKENDS",
    "AttentionSpec",
    "Backend",
    "BlockSizes",
    "KVPages",
    "RaggedBatch",
    "TokenRows",
    "__version__",
    "check_batch",
    "paged_attention",
    "pallas_paged_attention",
    "pallas_prefill_attention",
    "resolve_backend",
    "token_rows",
    "write_kv",
]
