"""The Granite family (Granite 3): Llama's form, with factors in four places."""

import dataclasses

from paged_attn_layer._src.convert.gguf_names import GGUFNames
from paged_attn_layer._src.models import llama
from paged_attn_layer._src.models.decoder_config import DecoderConfig, LayerConfig
from paged_attn_layer._src.models.decoder_family import decoder_family
from paged_cache import HFConfig


def read_config(config: HFConfig) -> DecoderConfig:
    """The config of a Granite model."""
    return with_multipliers(llama.read_config(config), config)


def with_multipliers(decoder: DecoderConfig, config: HFConfig) -> DecoderConfig:
    """The decoder with Granite's factors on the embedding, the attention scores, the residuals and the logits."""
    attention, residual = config.number("attention_multiplier", 1.0), config.number("residual_multiplier", 1.0)

    def scaled(layer: LayerConfig) -> LayerConfig:
        scores = dataclasses.replace(layer.attention, softmax_scale=attention)
        return dataclasses.replace(layer, attention=scores, residual_multiplier=residual)

    return dataclasses.replace(
        decoder,
        layers=tuple(map(scaled, decoder.layers)),
        embed_scale=config.number("embedding_multiplier", 1.0),
        logit_scale=1 / config.number("logits_scaling", 1.0),
    )


FAMILY = decoder_family(
    architectures=("GraniteForCausalLM",),
    model_types=("granite",),
    read_config=read_config,
    weights=llama.weights,
    gguf=GGUFNames(
        architecture="granite",
        tensors=llama.gguf_tensors,
        settings=(
            ("attention.scale", "attention_multiplier"),
            ("embedding_scale", "embedding_multiplier"),
            ("residual_scale", "residual_multiplier"),
            ("logit_scale", "logits_scaling"),  # what logits are divided by, as in a config.json
        ),
        switches=llama.GGUF_BIASES,
    ),
)
