"""The model families that are supported."""

from collections.abc import Mapping
from typing import Any

from paged_attn_layer._src.convert.gguf_names import GGUFNames
from paged_attn_layer._src.models import llama, mistral, qwen2
from paged_attn_layer._src.models.family import Family

FAMILIES = (llama.FAMILY, mistral.FAMILY, qwen2.FAMILY)


def find_family(config: Mapping[str, Any]) -> Family:
    """The family of a config.json: by its `architectures`, or by its `model_type` if it has none.

    Raises:
        ValueError: `architectures` is not a list.
        NotImplementedError: the family is not supported; names it, and those that are.
    """
    architectures = config.get("architectures") or ()
    if not isinstance(architectures, list | tuple):
        raise ValueError(f"architectures={architectures!r} must be a list, such as ['LlamaForCausalLM']")
    if not architectures:
        return _by_model_type(config.get("model_type"))
    for family in FAMILIES:
        if architectures[0] in family.architectures:
            return family
    supported = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise NotImplementedError(f"architecture {architectures[0]!r} is not supported; supported are {supported}")


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


def _by_model_type(model_type: str | None) -> Family:
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    supported = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise NotImplementedError(
        f"the config has no architectures, and model_type={model_type!r} is not supported; supported are {supported}"
    )
