"""The model families that are supported."""

from collections.abc import Mapping
from typing import Any

from paged_attn_layer._src.convert.gguf_names import GGUFNames
from paged_attn_layer._src.models import (
    cohere,
    cohere2,
    deepseek_v2,
    deepseek_v3,
    gemma2,
    gemma3,
    gemma4,
    glm,
    glm4,
    gpt2,
    gpt_oss,
    granite,
    granitemoehybrid,
    llama,
    ministral3,
    mistral,
    mixtral,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
)
from paged_attn_layer._src.models.family import Family
from paged_attn_layer._src.models.not_supported import what_is_missing
from paged_cache import HFConfig

FAMILIES = (
    llama.FAMILY,
    mistral.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    gemma2.FAMILY,
    gemma3.FAMILY,
    gemma4.FAMILY,
    cohere.FAMILY,
    cohere2.FAMILY,
    glm.FAMILY,
    glm4.FAMILY,
    gpt2.FAMILY,
    granite.FAMILY,
    granitemoehybrid.FAMILY,
    ministral3.FAMILY,
    olmo2.FAMILY,
    olmo3.FAMILY,
    phi3.FAMILY,
    smollm3.FAMILY,
    qwen3_moe.FAMILY,
    mixtral.FAMILY,
    gpt_oss.FAMILY,
    deepseek_v2.FAMILY,
    deepseek_v3.FAMILY,
)


def find_family(config: HFConfig) -> Family:
    """The family of a config.json: by its `architectures`, or by its `model_type` if it has none.

    Raises:
        NotImplementedError: the family is not supported; names it, those that are, and what it needs if that is known.
    """
    for family in FAMILIES:
        if config.architecture in family.architectures:
            return family
    name = config.architecture or config.model_type
    supported = ", ".join(name for family in FAMILIES for name in family.architectures)
    missing = what_is_missing(config.architecture)
    raise NotImplementedError(f"architecture {name!r} is not supported{missing}; supported are {supported}")


def read_config(config: Mapping[str, Any]) -> Any:
    """The config of the family that a parsed config.json names: what the family's model is built from.

    >>> read_config({"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96,
    ...     "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 2}).layers[0].attention.head_dim
    8

    Raises:
        ValueError: a key is missing, or has a value that means nothing; names it.
        NotImplementedError: the family, or a setting of it, is not supported; names it.
    """
    settings = HFConfig.of(config)
    return find_family(settings).read_config(settings)


def find_gguf_family(architecture: str | None) -> tuple[Family, GGUFNames]:
    """The family of a GGUF file, by its `general.architecture`, and how the file is read.

    Raises:
        NotImplementedError: the family is not supported in a GGUF file; names it, and those that are.
    """
    readable = {family.gguf.architecture: (family, family.gguf) for family in FAMILIES if family.gguf}
    if architecture not in readable:
        raise NotImplementedError(
            f"GGUF architecture {architecture!r} is not supported; supported are {', '.join(readable)}"
        )
    return readable[architecture]
