"""The Gemma 3 family: text models, and the text part of models that see pictures too."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from paged_attn_layer._src.convert.gguf_names import GGUFNames
from paged_attn_layer._src.models import gemma2
from paged_attn_layer._src.models.decoder_config import DecoderConfig
from paged_attn_layer._src.models.decoder_family import decoder_family
from paged_attn_layer._src.models.read_decoder import read_norm
from paged_cache import HFConfig

_LAYER_TYPES = ("full_attention", "sliding_attention")


def read_config(config: HFConfig) -> DecoderConfig:
    """The config of a Gemma 3 model: Gemma 2's form, with norms of queries and keys, and rotary settings by layer."""
    if config.has("attn_logit_softcapping"):
        raise NotImplementedError("attn_logit_softcapping is not supported: no Gemma 3 has it; leave it out")
    config = config.replace({"rope_parameters": _rope_parameters(config), "rope_scaling": None})
    norm = read_norm(config, offset=1.0)
    attentions = [dataclasses.replace(each, qk_norm=norm) for each in gemma2.read_gemma_attentions(config)]
    return gemma2.read_gemma(config, attentions)


def _rope_parameters(config: HFConfig) -> Mapping[str, Any]:
    """The rotary settings of both kinds of layers. `rope_theta` and `rope_scaling` are those of full attention."""
    given = config.mapping("rope_parameters")
    if given.keys() - set(_LAYER_TYPES):
        raise ValueError(f"rope_parameters must have settings for {' and '.join(_LAYER_TYPES)} alone")
    full, local = (HFConfig(given).mapping(layer_type) for layer_type in _LAYER_TYPES)
    full = {"rope_theta": config.number("rope_theta", 1_000_000.0), **full, **config.mapping("rope_scaling")}
    return {
        "full_attention": full,
        "sliding_attention": {"rope_theta": config.number("rope_local_base_freq", 10_000.0), **local},
    }


def gguf_implied(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A file without the window's size has no windows."""
    scale = gemma2.gguf_scale(config, scaled_by_hidden_size=62)
    return {**scale, "sliding_window": config.get("sliding_window")}


FAMILY = decoder_family(
    architectures=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    model_types=("gemma3_text",),
    read_config=read_config,
    weights=gemma2.weights,
    gguf=GGUFNames(
        architecture="gemma3",
        tensors=gemma2.gguf_tensors,
        settings=(
            ("attention.sliding_window", "sliding_window"),
            ("rope.freq_base_swa", "rope_local_base_freq"),
            ("final_logit_softcapping", "final_logit_softcapping"),
        ),
        implied=gguf_implied,
        switches=(("blk.0.attn_q.bias", "attention_bias"),),
    ),
)
