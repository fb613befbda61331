"""The Mistral family: Llama's form, with a sliding window in every layer."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from paged_attn_layer._src.models import llama
from paged_attn_layer._src.models.config import ModelConfig


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """The config of a Mistral model."""
    return ModelConfig.from_hf({**config, "architectures": ["MistralForCausalLM"]})


# llama.cpp stores Mistral's models as files of architecture `llama`.
FAMILY = dataclasses.replace(
    llama.FAMILY,
    architectures=("MistralForCausalLM",),
    model_types=("mistral",),
    read_config=read_config,
    gguf=None,
)
