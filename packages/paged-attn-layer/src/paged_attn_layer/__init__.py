"""Paged attention as a layer for JAX: one attention call, flax.nnx modules, Hugging Face conversion, an engine."""

from paged_attn_layer._src.attention.attend import Attended, attend, prepare
from paged_attn_layer._src.attention.mesh import on_mesh
from paged_attn_layer._src.blocks.attention import AttentionConfig, PagedAttention
from paged_attn_layer._src.blocks.latent_attention import LatentAttentionConfig
from paged_attn_layer._src.blocks.mlp import ClampedGLU, MLPConfig
from paged_attn_layer._src.blocks.moe import MoEConfig
from paged_attn_layer._src.blocks.norm import NormConfig
from paged_attn_layer._src.blocks.rope import RopeConfig, apply_rope
from paged_attn_layer._src.blocks.router import RouterConfig
from paged_attn_layer._src.convert.load import load_model
from paged_attn_layer._src.convert.memory_source import WeightFunction
from paged_attn_layer._src.convert.save import ConversionReport, convert_checkpoint, save_model
from paged_attn_layer._src.convert.source import ConversionError
from paged_attn_layer._src.convert.tokenizer import load_tokenizer

# EasyDeL's names and meanings (2025), for code that is written against its attention operator.
from paged_attn_layer._src.easydel.operator import PagedAttn
from paged_attn_layer._src.easydel.registry import (
    AttentionImpl,
    AttentionMetadata,
    AttentionOutput,
    AttentionRegistry,
)
from paged_attn_layer._src.engine.completion import Completion
from paged_attn_layer._src.engine.config import EngineConfig
from paged_attn_layer._src.engine.engine import Engine
from paged_attn_layer._src.engine.params import SamplingParams
from paged_attn_layer._src.engine.request import FinishReason, Request
from paged_attn_layer._src.engine.stats import EngineStats, StepRecord
from paged_attn_layer._src.engine.text import Tokenizer
from paged_attn_layer._src.models.causal_lm import CausalLM
from paged_attn_layer._src.models.decoder import Decoder
from paged_attn_layer._src.models.decoder_config import DecoderConfig, LayerConfig
from paged_attn_layer._src.models.family import Family
from paged_attn_layer._src.models.registry import find_family, read_config
from paged_attn_layer._version import __version__

__all__ = [
    "Attended",
    "AttentionConfig",
    "AttentionImpl",
    "AttentionMetadata",
    "AttentionOutput",
    "AttentionRegistry",
    "CausalLM",
    "ClampedGLU",
    "Completion",
    "ConversionError",
    "ConversionReport",
    "Decoder",
    "DecoderConfig",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "Family",
    "FinishReason",
    "LatentAttentionConfig",
    "LayerConfig",
    "MLPConfig",
    "MoEConfig",
    "NormConfig",
    "PagedAttention",
    "PagedAttn",
    "Request",
    "RopeConfig",
    "RouterConfig",
    "SamplingParams",
    "StepRecord",
    "Tokenizer",
    "WeightFunction",
    "__version__",
    "apply_rope",
    "attend",
    "convert_checkpoint",
    "find_family",
    "load_model",
    "load_tokenizer",
    "on_mesh",
    "prepare",
    "read_config",
    "save_model",
]
