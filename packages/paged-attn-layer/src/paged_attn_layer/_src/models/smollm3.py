"""The SmolLM3 family: Llama's form, without rotary embedding in every fourth layer."""

import dataclasses

from paged_attn_layer._src.convert.gguf_names import GGUFNames
from paged_attn_layer._src.models import llama
from paged_attn_layer._src.models.decoder_config import DecoderConfig
from paged_attn_layer._src.models.decoder_family import decoder_family
from paged_attn_layer._src.models.read_decoder import read_attentions, read_pre_norm_decoder
from paged_cache import HFConfig


def read_config(config: HFConfig) -> DecoderConfig:
    """The config of a SmolLM3 model."""
    bias = config.flag("attention_bias", False)
    attentions = read_attentions(config, qkv_bias=bias, out_bias=bias)
    attentions = [
        attention if has_rope else dataclasses.replace(attention, rope=None)
        for attention, has_rope in zip(attentions, config.layers_with_rope(), strict=True)
    ]
    return read_pre_norm_decoder(config, attentions, mlp_bias=config.flag("mlp_bias", False))


FAMILY = decoder_family(
    architectures=("SmolLM3ForCausalLM",),
    model_types=("smollm3",),
    read_config=read_config,
    weights=llama.weights,
    # A file does not say which layers have no rotary embedding: every fourth, as in a config.json that leaves it out.
    gguf=GGUFNames(architecture="smollm3", tensors=llama.gguf_tensors, switches=llama.GGUF_BIASES),
)
