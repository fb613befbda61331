"""The Gemma 2 family: norms around attention and MLP, capped logits, a window in every other layer."""

import dataclasses
import math

from paged_attn_layer._src.convert.weights import WeightRule
from paged_attn_layer._src.models.decoder_config import DecoderConfig, LayerConfig
from paged_attn_layer._src.models.decoder_family import decoder_family
from paged_attn_layer._src.models.read_decoder import read_attentions, read_cap, read_decoder, read_mlp, read_norm
from paged_attn_layer._src.models.weight_rules import ATTENTION, EMBEDDING, FINAL_NORM, MLP, head, layer_norm
from paged_cache import HFConfig


def read_config(config: HFConfig) -> DecoderConfig:
    """The config of a Gemma 2 model."""
    bias, norm = config.flag("attention_bias", False), read_norm(config, offset=1.0)
    mlp = read_mlp(config, act_key="hidden_activation")
    scale, cap = config.number("query_pre_attn_scalar") ** -0.5, read_cap(config, "attn_logit_softcapping")
    attentions = read_attentions(config, qkv_bias=bias, out_bias=bias)
    layers = [
        LayerConfig(
            attention=dataclasses.replace(each, softmax_scale=scale, soft_cap=cap),
            mlp=mlp,
            pre_norm=norm,
            post_norm=norm,
        )
        for each in attentions
    ]
    return dataclasses.replace(
        read_decoder(config, layers, norm),
        embed_scale=math.sqrt(config.whole("hidden_size")),
        logit_soft_cap=read_cap(config, "final_logit_softcapping"),
    )


def weights(config: DecoderConfig) -> tuple[WeightRule, ...]:
    """The rules of a Gemma 2 model."""
    return (
        EMBEDDING,
        layer_norm("input_layernorm", "attention_norm"),
        *ATTENTION,
        layer_norm("post_attention_layernorm", "attention_post_norm"),
        layer_norm("pre_feedforward_layernorm", "mlp_norm"),
        *MLP,
        layer_norm("post_feedforward_layernorm", "mlp_post_norm"),
        FINAL_NORM,
        *head(config),
    )


FAMILY = decoder_family(
    architectures=("Gemma2ForCausalLM",),
    model_types=("gemma2",),
    read_config=read_config,
    weights=weights,
)
