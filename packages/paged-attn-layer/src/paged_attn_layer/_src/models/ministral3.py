"""The Ministral 3 family (also the text of Mistral Small 3): yarn, and queries that grow with their position."""

import dataclasses

from paged_attn_layer._src.blocks.attention import QueryGrowth
from paged_attn_layer._src.models import llama
from paged_attn_layer._src.models.decoder_config import DecoderConfig
from paged_attn_layer._src.models.decoder_family import decoder_family
from paged_attn_layer._src.models.read_decoder import read_attentions, read_pre_norm_decoder
from paged_cache import HFConfig


def read_config(config: HFConfig) -> DecoderConfig:
    """The config of a Ministral 3 model, or of the text part of a model that sees pictures, which may be a Mistral."""
    growth = _read_growth(config) if config.model_type == "ministral3" else None
    attentions = [dataclasses.replace(each, query_growth=growth) for each in read_attentions(config)]
    return read_pre_norm_decoder(config, attentions)


def _read_growth(config: HFConfig) -> QueryGrowth:
    rope = HFConfig(config.mapping("rope_scaling") or config.mapping("rope_parameters"))
    return QueryGrowth(beta=rope.number("llama_4_scaling_beta"), tokens=rope.whole("original_max_position_embeddings"))


FAMILY = decoder_family(
    architectures=("Ministral3ForCausalLM", "Mistral3ForConditionalGeneration"),
    model_types=("ministral3",),
    read_config=read_config,
    weights=llama.weights,
)
