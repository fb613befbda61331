"""Weights under Hugging Face's names, wherever they come from, and the config of their model."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from paged_attn_layer._src.convert.lazy import LazyArray, full_index
from paged_attn_layer._src.convert.source import reading
from paged_cache import HFConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_PREFIX = "model."
"""Starts the name of every weight but the head's. Weights of a model without its head have none."""
_TEXT_PREFIXES = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "lm_head.": "lm_head.",
}
"""How names begin where the language model is a part of a larger one, and how they begin where it is all."""
_ROWS = 4096
"""Rows of embedding and head that are compared at once."""


class HFWeights:
    """A `WeightSource` of lazy arrays. Weights of a model without its head get the names that they have with it."""

    def __init__(
        self,
        where: str,
        settings_from: str,
        config: Mapping[str, Any],
        weights: Mapping[str, LazyArray | None],
        problems: Sequence[str] = (),
    ) -> None:
        """Nothing is read, but the embedding and the head where the config ties them and both are there.

        Args:
            where: what the weights are, for messages.
            settings_from: what states the config, for messages.
            config: the content of a config.json.
            weights: the weights by name; `None` for one that cannot be read.
            problems: what is wrong with them, a line each.
        """
        self.where, self.settings_from, self.config, self.problems = where, settings_from, config, problems
        self._weights = _with_prefix(_of_the_text(weights))
        self.shapes = {name: weight and weight.shape for name, weight in self._weights.items()}
        with reading(settings_from):
            tied = HFConfig.of(config).flag("tie_word_embeddings", False)
        if tied and not problems and self._has_its_own_head():
            self.config = {**config, "tie_word_embeddings": False}

    def weight(self, name: str) -> LazyArray:
        """One weight, in the type that it has, or float32 if it is quantised."""
        weight = self._weights[name]
        if weight is None:
            raise ValueError(f"{name} of {self.where} cannot be read; `problems` says why")
        return weight

    def _has_its_own_head(self) -> bool:
        """True if the head's weight is there and is not the embedding, whatever the config says."""
        head, embedding = self._weights.get(HEAD), self._weights.get(EMBEDDING)
        if head is None or embedding is None:
            return False
        if head.shape != embedding.shape:
            return True
        rows, *rest = head.shape
        for start in range(0, rows, _ROWS):
            part = (slice(start, min(start + _ROWS, rows)), *full_index(tuple(rest)))
            if not np.array_equal(head.read(part), embedding.read(part)):
                return True
        return False


def get_setting(config: Mapping[str, Any], key: str) -> Any:
    """The value of a key of the language model."""
    return (text_settings(config) or config).get(key)


def set_setting(config: Mapping[str, Any], key: str, value: Any) -> Mapping[str, Any]:
    """The config with another value for a key of the language model."""
    nested = text_settings(config)
    return {**config, "text_config": {**nested, key: value}} if nested else {**config, key: value}


def text_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The keys of the language model, where they lie beside those of, say, images; else none."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else {}


def _of_the_text(weights: Mapping[str, LazyArray | None]) -> Mapping[str, LazyArray | None]:
    """The weights of the language model alone, where it is one part of a model: those for pictures are left out."""
    prefixes = [prefix for prefix in _TEXT_PREFIXES if "language_model." in prefix]
    if not any(name.startswith(tuple(prefixes)) for name in weights):
        return weights
    return {
        ours + name.removeprefix(theirs): weight
        for name, weight in weights.items()
        for theirs, ours in _TEXT_PREFIXES.items()
        if name.startswith(theirs)
    }


def _with_prefix(weights: Mapping[str, LazyArray | None]) -> Mapping[str, LazyArray | None]:
    if EMBEDDING.removeprefix(_PREFIX) not in weights or any(name.startswith(_PREFIX) for name in weights):
        return weights
    return {name if name == HEAD else _PREFIX + name: weight for name, weight in weights.items()}
