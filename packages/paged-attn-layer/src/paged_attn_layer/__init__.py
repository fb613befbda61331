"""Paged attention as a layer for JAX: operator, flax.nnx modules, Hugging Face conversion, generation."""

from paged_attn_layer._src.attention.mesh import resolve_mesh
from paged_attn_layer._src.blocks.attention import AttentionConfig, PagedAttention
from paged_attn_layer._src.blocks.rope import RopeConfig, apply_rope, rope_frequencies
from paged_attn_layer._src.convert.load import load_model
from paged_attn_layer._src.convert.source import ConversionError
from paged_attn_layer._src.convert.tokenizer import load_tokenizer
from paged_attn_layer._src.easydel.operator import PagedAttn
from paged_attn_layer._src.easydel.registry import AttentionImpl, AttentionMetadata, AttentionOutput, AttentionRegistry
from paged_attn_layer._src.engine import Completion, Engine, EngineConfig, EngineStats, Request, Scheduler
from paged_attn_layer._src.models import LlamaForCausalLM, ModelConfig
from paged_attn_layer._version import __version__

__all__ = [
    "AttentionConfig",
    "AttentionImpl",
    "AttentionMetadata",
    "AttentionOutput",
    "AttentionRegistry",
    "Completion",
    "ConversionError",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "LlamaForCausalLM",
    "ModelConfig",
    "PagedAttention",
    "PagedAttn",
    "Request",
    "RopeConfig",
    "Scheduler",
    "__version__",
    "apply_rope",
    "load_model",
    "load_tokenizer",
    "resolve_mesh",
    "rope_frequencies",
]
