"""The Cohere family (Command R): one norm a layer, whose rows attention and MLP share, and a factor on the logits."""

import dataclasses
from collections.abc import Iterable

from paged_attn_layer._src.blocks.attention import AttentionConfig
from paged_attn_layer._src.blocks.norm import NormConfig
from paged_attn_layer._src.convert.weights import WeightRule
from paged_attn_layer._src.models.decoder_config import DecoderConfig, LayerConfig
from paged_attn_layer._src.models.decoder_family import decoder_family
from paged_attn_layer._src.models.read_decoder import read_attentions, read_decoder, read_mlp
from paged_attn_layer._src.models.weight_rules import ATTENTION, EMBEDDING, FINAL_NORM, MLP, head, layer_norm
from paged_cache import HFConfig


def read_config(config: HFConfig) -> DecoderConfig:
    """The config of a Command R model."""
    qk_norm = _read_norm(config) if config.flag("use_qk_norm", False) else None
    attentions = read_cohere_attentions(config)
    return read_cohere_like(
        config, [dataclasses.replace(each, qk_norm=qk_norm, qk_norm_over="each_head") for each in attentions]
    )


def read_cohere_attentions(config: HFConfig) -> list[AttentionConfig]:
    """The attention of each layer, as both families of Cohere have it: neighbouring elements of a head turn."""
    bias = config.flag("attention_bias", False)
    return read_attentions(config, qkv_bias=bias, out_bias=bias, interleaved_rope=True)


def read_cohere_like(config: HFConfig, attentions: Iterable[AttentionConfig]) -> DecoderConfig:
    """The config of a model in Cohere's form: parallel layers of these attentions, and scaled logits."""
    norm, mlp = _read_norm(config), read_mlp(config)
    layers = [LayerConfig(attention=each, mlp=mlp, pre_norm=norm, parallel=True) for each in attentions]
    return dataclasses.replace(read_decoder(config, layers, norm), logit_scale=config.number("logit_scale"))


def _read_norm(config: HFConfig) -> NormConfig:
    return NormConfig(kind="layer", eps=config.number("layer_norm_eps"))


def weights(config: DecoderConfig) -> tuple[WeightRule, ...]:
    """The rules of a model in Cohere's form."""
    return (
        EMBEDDING,
        layer_norm("input_layernorm", "attention_norm"),
        *ATTENTION,
        *MLP,
        FINAL_NORM,
        *head(config),
    )


FAMILY = decoder_family(
    architectures=("CohereForCausalLM",),
    model_types=("cohere",),
    read_config=read_config,
    weights=weights,
)
