"""The Cohere 2 family (Command R7B, Command A): Cohere's form, with windows and rotary embedding in 3 of 4 layers."""

import dataclasses

from paged_attn_layer._src.models import cohere
from paged_attn_layer._src.models.decoder_config import DecoderConfig
from paged_attn_layer._src.models.decoder_family import decoder_family
from paged_cache import HFConfig


def read_config(config: HFConfig) -> DecoderConfig:
    """The config of a Cohere 2 model."""
    attentions = [
        each if each.sliding_window else dataclasses.replace(each, rope=None)
        for each in cohere.read_cohere_attentions(config)
    ]
    return cohere.read_cohere_like(config, attentions)


FAMILY = decoder_family(
    architectures=("Cohere2ForCausalLM",),
    model_types=("cohere2",),
    read_config=read_config,
    weights=cohere.weights,
)
