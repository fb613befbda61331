"""The GLM-4 family (GLM-4-0414, GLM-Z1): GLM's form, with norms after attention and MLP too."""

import dataclasses

from paged_attn_layer._src.convert.weights import WeightRule
from paged_attn_layer._src.models import glm
from paged_attn_layer._src.models.decoder_config import DecoderConfig
from paged_attn_layer._src.models.decoder_family import decoder_family
from paged_attn_layer._src.models.weight_rules import layer_norm
from paged_cache import HFConfig


def read_config(config: HFConfig) -> DecoderConfig:
    """The config of a GLM-4 model."""
    decoder = glm.read_config(config)
    layers = (dataclasses.replace(layer, post_norm=layer.pre_norm) for layer in decoder.layers)
    return dataclasses.replace(decoder, layers=tuple(layers))


def weights(config: DecoderConfig) -> tuple[WeightRule, ...]:
    """GLM's rules, and those of the norms after attention and MLP."""
    return (
        *glm.weights(config),
        layer_norm("post_self_attn_layernorm", "attention_post_norm"),
        layer_norm("post_mlp_layernorm", "mlp_post_norm"),
    )


FAMILY = decoder_family(
    architectures=("Glm4ForCausalLM",),
    model_types=("glm4",),
    read_config=read_config,
    weights=weights,
)
