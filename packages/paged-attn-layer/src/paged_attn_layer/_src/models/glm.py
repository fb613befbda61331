"""The GLM family (GLM-4-9B of 2024): Llama's form, where the first half of each head turns, in neighbouring pairs."""

from paged_attn_layer._src.convert.weights import WeightRule
from paged_attn_layer._src.models import llama
from paged_attn_layer._src.models.decoder_config import DecoderConfig
from paged_attn_layer._src.models.decoder_family import decoder_family
from paged_attn_layer._src.models.read_decoder import read_attentions, read_pre_norm_decoder
from paged_attn_layer._src.models.weight_rules import fused_gate_up
from paged_cache import HFConfig


def read_config(config: HFConfig) -> DecoderConfig:
    """The config of a GLM model."""
    bias = config.flag("attention_bias", True)
    attentions = read_attentions(config, qkv_bias=bias, partial_rope=True, interleaved_rope=True)
    return read_pre_norm_decoder(config, attentions)


def weights(config: DecoderConfig) -> tuple[WeightRule, ...]:
    """Llama's rules, with gate and up in one weight."""
    return *fused_gate_up(config), *llama.weights(config)


FAMILY = decoder_family(
    architectures=("GlmForCausalLM",),
    model_types=("glm",),
    read_config=read_config,
    weights=weights,
)
