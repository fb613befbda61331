"""What the parts of a GGUF file of one family are called in a Hugging Face checkpoint."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from paged_attn_layer._src.convert.weights import WeightRule


@dataclasses.dataclass(frozen=True, kw_only=True)
class GGUFNames:
    """How a GGUF file of one family is read as a Hugging Face checkpoint."""

    architecture: str
    """The file's `general.architecture`."""
    tensors: Callable[[Mapping[str, Any]], tuple[WeightRule, ...]]
    """Rules from GGUF tensors to Hugging Face weights, for the Hugging Face config of the file."""
    settings: tuple[tuple[str, str], ...] = ()
    """Metadata keys that only this family has, without `<architecture>.`, each with its key in a config.json."""
    switches: tuple[tuple[str, str], ...] = ()
    """GGUF tensors, each with the key in a config.json that is true if the file has the tensor."""
    implied: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    """Makes the keys of a config.json that a file does not state, but that follow from the others."""
