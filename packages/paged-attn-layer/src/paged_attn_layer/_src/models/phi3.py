"""The Phi-3 family (Phi-3, Phi-3.5, Phi-4, Phi-4-mini): Llama's form, with fused projections and longrope."""

from paged_attn_layer._src.convert.weights import WeightRule
from paged_attn_layer._src.models import llama
from paged_attn_layer._src.models.decoder_config import DecoderConfig
from paged_attn_layer._src.models.decoder_family import decoder_family
from paged_attn_layer._src.models.read_decoder import read_attentions, read_pre_norm_decoder
from paged_attn_layer._src.models.weight_rules import fused_gate_up, fused_qkv
from paged_cache import HFConfig

_NAMES_OF_LONGROPE = ("su", "yarn")
"""What files of the first Phi-3 models call longrope."""


def read_config(config: HFConfig) -> DecoderConfig:
    """The config of a Phi-3 model."""
    config = _with_longrope(config)
    return read_pre_norm_decoder(config, read_attentions(config, partial_rope=True))


def weights(config: DecoderConfig) -> tuple[WeightRule, ...]:
    """Llama's rules, with queries, keys and values in one weight, and gate and up in one."""
    return *fused_qkv(config), *fused_gate_up(config), *llama.weights(config)


def _with_longrope(config: HFConfig) -> HFConfig:
    """The config with today's name of its rotary embedding."""
    rope = config.mapping("rope_scaling") or config.mapping("rope_parameters")
    if rope.get("rope_type", rope.get("type")) not in _NAMES_OF_LONGROPE:
        return config
    return config.replace({"rope_scaling": {**rope, "rope_type": "longrope"}})


FAMILY = decoder_family(
    architectures=("Phi3ForCausalLM",),
    model_types=("phi3",),
    read_config=read_config,
    weights=weights,
)
