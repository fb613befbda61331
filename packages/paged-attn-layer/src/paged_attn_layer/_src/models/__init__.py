"""Decoders built from `PagedAttention`."""

from paged_attn_layer._src.models.config import SUPPORTED_ARCHITECTURES, ModelConfig
from paged_attn_layer._src.models.decoder import Decoder as LlamaForCausalLM

__all__ = ["SUPPORTED_ARCHITECTURES", "LlamaForCausalLM", "ModelConfig"]
