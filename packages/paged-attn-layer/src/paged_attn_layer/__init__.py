"""Paged attention as a layer for JAX: operator, flax.nnx modules, Hugging Face conversion, generation."""

from paged_attn_layer._version import __version__
from paged_attn_layer.convert import ConversionError, load_model, load_tokenizer
from paged_attn_layer.engine import Completion, Engine, EngineConfig, EngineStats, Request, Scheduler
from paged_attn_layer.layer import AttentionConfig, PagedAttention
from paged_attn_layer.mesh import resolve_mesh
from paged_attn_layer.models import LlamaForCausalLM, ModelConfig
from paged_attn_layer.operator import PagedAttn
from paged_attn_layer.registry import AttentionImpl, AttentionMetadata, AttentionOutput, AttentionRegistry
from paged_attn_layer.rope import RopeConfig, apply_rope, rope_frequencies

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
