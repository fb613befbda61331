"""The Qwen3 family (dense): Qwen2's windows, and queries and keys normalised per head."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from paged_attn_layer._src.blocks.attention import AttentionConfig
from paged_attn_layer._src.convert.gguf_names import GGUFNames
from paged_attn_layer._src.convert.weights import WeightRule, rename
from paged_attn_layer._src.models import llama, qwen2
from paged_attn_layer._src.models.decoder_config import DecoderConfig, LayerConfig
from paged_attn_layer._src.models.decoder_family import decoder_family
from paged_attn_layer._src.models.read_decoder import read_attentions, read_decoder, read_mlp, read_norm
from paged_cache import HFConfig


def read_config(config: HFConfig) -> DecoderConfig:
    """The config of a Qwen3 model."""
    norm, mlp = read_norm(config), read_mlp(config)
    layers = [LayerConfig(attention=each, mlp=mlp, pre_norm=norm) for each in read_qwen3_attentions(config)]
    return read_decoder(config, layers, norm)


def read_qwen3_attentions(config: HFConfig) -> Iterable[AttentionConfig]:
    """The attention of each layer; Qwen3-MoE has the same."""
    bias, norm = config.flag("attention_bias", False), read_norm(config)
    attentions = read_attentions(config, qkv_bias=bias, out_bias=bias)
    return (dataclasses.replace(each, qk_norm=norm) for each in attentions)


def gguf_tensors(config: Mapping[str, Any]) -> tuple[WeightRule, ...]:
    """The tensors of a file of architecture `qwen3`: Qwen2's, and the norms of queries and keys."""
    norms = rename("blk.{layer}.attn_{q|k}_norm.weight", "model.layers.{layer}.self_attn.{q|k}_norm.weight")
    return *qwen2.gguf_tensors(config), norms


FAMILY = decoder_family(
    architectures=("Qwen3ForCausalLM",),
    model_types=("qwen3",),
    read_config=read_config,
    weights=llama.weights,
    gguf=GGUFNames(architecture="qwen3", tensors=gguf_tensors, switches=(("blk.0.attn_q.bias", "attention_bias"),)),
)
