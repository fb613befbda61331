"""The Mistral family: Llama's form, with a sliding window in every layer."""

import dataclasses

from paged_attn_layer._src.models import llama
from paged_attn_layer._src.models.decoder_config import read_decoder_config

# llama.cpp stores Mistral's models as files of architecture `llama`.
FAMILY = dataclasses.replace(
    llama.FAMILY,
    architectures=("MistralForCausalLM",),
    model_types=("mistral",),
    read_config=read_decoder_config,
    gguf=None,
)
