"""The OLMo 2 family: norms after attention and MLP instead of before, and queries and keys normalised as a whole."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from paged_attn_layer._src.convert.gguf_names import GGUFNames
from paged_attn_layer._src.convert.weights import WeightRule, rename
from paged_attn_layer._src.models import qwen3
from paged_attn_layer._src.models.decoder_config import DecoderConfig, LayerConfig
from paged_attn_layer._src.models.decoder_family import decoder_family
from paged_attn_layer._src.models.read_decoder import read_attentions, read_decoder, read_mlp, read_norm
from paged_attn_layer._src.models.weight_rules import ATTENTION, EMBEDDING, FINAL_NORM, MLP, head, layer_norm
from paged_cache import HFConfig


def read_config(config: HFConfig) -> DecoderConfig:
    """The config of an OLMo 2 model."""
    norm, mlp, bias = read_norm(config), read_mlp(config), config.flag("attention_bias", False)
    layers = [
        LayerConfig(
            attention=dataclasses.replace(attention, qk_norm=norm, qk_norm_over="projection"),
            mlp=mlp,
            pre_norm=None,
            post_norm=norm,
        )
        for attention in read_attentions(config, qkv_bias=bias, out_bias=bias)
    ]
    return read_decoder(config, layers, norm)


def weights(config: DecoderConfig) -> tuple[WeightRule, ...]:
    """The rules of a model in OLMo 2's form."""
    return (
        EMBEDDING,
        *ATTENTION,
        layer_norm("post_attention_layernorm", "attention_post_norm"),
        *MLP,
        layer_norm("post_feedforward_layernorm", "mlp_post_norm"),
        FINAL_NORM,
        *head(config),
    )


def gguf_tensors(config: Mapping[str, Any]) -> tuple[WeightRule, ...]:
    """The tensors of a file of architecture `olmo2`, all in Hugging Face's order."""
    theirs, ours = "blk.{layer}", "model.layers.{layer}"
    return (
        rename(f"{theirs}.post_attention_norm.weight", f"{ours}.post_attention_layernorm.weight"),
        rename(f"{theirs}.post_ffw_norm.weight", f"{ours}.post_feedforward_layernorm.weight"),
        *qwen3.gguf_tensors(config),
    )


FAMILY = decoder_family(
    architectures=("Olmo2ForCausalLM",),
    model_types=("olmo2",),
    read_config=read_config,
    weights=weights,
    gguf=GGUFNames(architecture="olmo2", tensors=gguf_tensors, switches=(("blk.0.attn_q.bias", "attention_bias"),)),
)
