"""The Qwen2 family (Qwen2, Qwen2.5): Llama's form, with biases of queries, keys and values, and optional windows."""

from collections.abc import Mapping
from typing import Any

from paged_attn_layer._src.convert.gguf_names import GGUFNames
from paged_attn_layer._src.convert.weights import WeightRule, rename
from paged_attn_layer._src.models import llama
from paged_attn_layer._src.models.decoder_config import DecoderConfig
from paged_attn_layer._src.models.decoder_family import decoder_family
from paged_cache import HFConfig


def read_config(config: HFConfig) -> DecoderConfig:
    """The config of a Qwen2 model."""
    return llama.read_llama_like(config, qkv_bias=True)


def gguf_tensors(_config: Mapping[str, Any]) -> tuple[WeightRule, ...]:
    """The tensors of a file of architecture `qwen2`, all in Hugging Face's order."""
    q_and_k = "model.layers.{layer}.self_attn.{q|k}_proj.{weight|bias}"
    return (*llama.GGUF_TENSORS, rename("blk.{layer}.attn_{q|k}.{weight|bias}", q_and_k))


FAMILY = decoder_family(
    architectures=("Qwen2ForCausalLM",),
    model_types=("qwen2",),
    read_config=read_config,
    weights=llama.weights,
    gguf=GGUFNames(architecture="qwen2", tensors=gguf_tensors),
)
