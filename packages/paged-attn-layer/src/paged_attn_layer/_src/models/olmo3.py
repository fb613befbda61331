"""The OLMo 3 family: OLMo 2's form, with windows in three of four layers and scaled positions in the others."""

from paged_attn_layer._src.models import olmo2
from paged_attn_layer._src.models.decoder_config import DecoderConfig
from paged_attn_layer._src.models.decoder_family import decoder_family
from paged_cache import HFConfig

_LAYER_TYPES = ("full_attention", "sliding_attention")
_THETA = 500000.0
"""The base that transformers takes where a file has none."""


def read_config(config: HFConfig) -> DecoderConfig:
    """The config of an OLMo 3 model."""
    return olmo2.read_config(_with_rope_by_type(config))


def _with_rope_by_type(config: HFConfig) -> HFConfig:
    """The config with rotary settings for each type of layer, read as transformers does.

    `rope_scaling` is for layers that see all keys, and so is a `rope_theta` beside it.

    Raises:
        ValueError: `rope_parameters` are for all layers alike, which transformers ignores.
    """
    given = config.mapping("rope_parameters")
    if given and not any(given.get(layer_type) for layer_type in _LAYER_TYPES):
        raise ValueError(
            f"rope_parameters={dict(given)} must have settings under full_attention and sliding_attention; nest it"
        )
    full, windowed = (given.get(layer_type) or {"rope_type": "default"} for layer_type in _LAYER_TYPES)
    full = {"rope_theta": config.number("rope_theta", _THETA), **full, **config.mapping("rope_scaling")}
    by_type = {"full_attention": full, "sliding_attention": {"rope_theta": _THETA, **windowed}}
    return config.replace({"rope_parameters": by_type, "rope_scaling": None})


FAMILY = decoder_family(
    architectures=("Olmo3ForCausalLM",),
    model_types=("olmo3",),
    read_config=read_config,
    weights=olmo2.weights,
)
