"""A Hugging Face config.json, read in one place."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Self

from paged_cache._src.spec.model_types import ARCHITECTURES, ASSUMED, KEY_NAMES, MODEL_TYPES

_OF_THE_WHOLE = ("quantization_config", "tie_word_embeddings")
"""Keys that count beside `text_config`, whatever is in it."""


class HFConfig:
    """The keys of a Hugging Face config.json, each read as what it must be.

        config = HFConfig.of(json.loads(path.read_text()))
        layers, theta = config.whole("num_hidden_layers"), config.number("rope_theta", 10000.0)

    A key has a value if the file gives it, or if the model type has one for files that leave the key out. A key that is
    `null` has no value, whatever the model type says: so do transformers' own classes. A getter gives its default where
    there is no value; without a default that is an error. Every error names the key and what it must be.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        *,
        architecture: str | None = None,
        model_type: str | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        """Keys that are of one level; `of` finds the other arguments in a file.

        Args:
            values: the keys.
            architecture: the model's class.
            model_type: the name of the model's kind.
            defaults: values of keys that are left out.
        """
        self.architecture = architecture
        """The model's class, such as `"LlamaForCausalLM"`; `None` if the file does not say."""
        self.model_type = model_type
        """The name of the model's kind, such as `"llama"`; `None` if the file does not say."""
        self._values = values
        self._defaults = defaults or {}
        self._assumed: dict[str, None] = {}

    @classmethod
    def of(cls, config: Mapping[str, Any], *, defaults: Mapping[str, Any] | None = None) -> Self:
        """The config of a file; of its `text_config`, where the language model is nested.

        >>> config = HFConfig.of({"model_type": "mistral", "hidden_size": 4096})
        >>> config.architecture, config.whole("hidden_size"), config.whole("sliding_window"), config.assumed
        ('MistralForCausalLM', 4096, 4096, ('sliding_window=4096',))

        Args:
            config: the parsed file. Change it to say what the file does not: `{**config, "head_dim": 128}`.
            defaults: values of keys that the file leaves out, beside those of its model type.

        Raises:
            ValueError: the config, its `text_config` or its `architectures` are not of the right kind.
        """
        outer = HFConfig(_mapping("the config", config))
        text = HFConfig(outer.mapping("text_config")) if outer.has("text_config") else outer
        model_type = text.text("model_type", "")
        if model_type not in ARCHITECTURES:  # none, or one of another project, such as Kimi K2's for DeepSeek-V3
            model_type = MODEL_TYPES.get(_architecture(text), model_type)
        architecture = _architecture(outer) or _architecture(text) or ARCHITECTURES.get(model_type, "")
        return cls(
            _common_names(
                {**text._values, **{key: outer.get(key) for key in _OF_THE_WHOLE if key in outer._values}},
                KEY_NAMES.get(model_type, {}),
            ),
            architecture=architecture or None,
            model_type=model_type or None,
            defaults={**ASSUMED.get(model_type, {}), **(defaults or {})},
        )

    def replace(self, values: Mapping[str, Any]) -> Self:
        """The same config with these values in place of what the file and the model type have.

        >>> HFConfig.of({"model_type": "llama", "head_dim": 64}).replace({"head_dim": 128}).whole("head_dim")
        128
        """
        return type(self)(
            {**self._values, **values},
            architecture=self.architecture,
            model_type=self.model_type,
            defaults=self._defaults,
        )

    @property
    def assumed(self) -> tuple[str, ...]:
        """The keys read so far that the file leaves out and the model type has, as `key=value`."""
        return tuple(self._assumed)

    def has(self, key: str) -> bool:
        """True if the key has a value."""
        return self.get(key) is not None

    def says(self, key: str) -> bool:
        """True if the file or its model type names the key, be it with `null`."""
        return key in self._values or key in self._defaults

    def get(self, key: str) -> Any:
        """The value as it is in the file; `None` without one."""
        if key in self._values or key not in self._defaults:
            return self._values.get(key)
        self._assumed[f"{key}={json.dumps(self._defaults[key])}"] = None
        return self._defaults[key]

    def whole(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number of at least `least`, below 2**63."""
        must = f"a whole number of at least {least}"
        value = self._value(key, default, must)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise _wrong(key, value, must)
        if value >= 2**63:  # JSON may have thousands of digits
            raise ValueError(f"{key} has {value.bit_length()} bits; it must be {must} and below 2**63")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        must = "a finite number above 0"
        value = self._value(key, default, must)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
            raise _wrong(key, value, must)
        return float(value)

    def flag(self, key: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self._value(key, default, "true or false")
        if not isinstance(value, bool):
            raise _wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A text."""
        value = self._value(key, default, "a text")
        if not isinstance(value, str):
            raise _wrong(key, value, "a text")
        return value

    def per_layer(self, key: str) -> Sequence[Any]:
        """A list with an entry for each of `num_hidden_layers` layers."""
        layers = self.whole("num_hidden_layers")
        must = f"a list with an entry for each of {layers} layers"
        value = self._value(key, None, must)
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != layers:
            raise _wrong(key, value, must)
        return value

    def layers_with_rope(self) -> list[bool]:
        """True for each layer with rotary embedding, where some have none (Llama 4, SmolLM3).

        `no_rope_layers` says so, in spite of its name; without it, every `no_rope_layer_interval`-th layer has none.
        """
        if self.get("no_rope_layers"):
            return [bool(has_rope) for has_rope in self.per_layer("no_rope_layers")]
        interval = self.whole("no_rope_layer_interval")
        return [bool((layer + 1) % interval) for layer in range(self.whole("num_hidden_layers"))]

    def mapping(self, key: str) -> Mapping[str, Any]:
        """An object of settings; an empty one if the key has no value."""
        return _mapping(key, self.get(key)) if self.has(key) else {}

    def _value(self, key: str, default: Any, must: str) -> Any:
        value = self.get(key)
        if value is not None:
            return value
        if default is None:
            raise ValueError(f"the config has no {key}; it must be {must}, so add it")
        return default


def _common_names(values: Mapping[str, Any], names: Mapping[str, str]) -> Mapping[str, Any]:
    """The values under the keys that most model types have. A key of the type's own goes before the common one."""
    return {**values, **{common: values[own] for own, common in names.items() if own in values}}


def _architecture(config: HFConfig) -> str:
    """The first of a file's `architectures`; empty if it names none."""
    names = config.get("architectures")
    if names in (None, []):
        return ""
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise _wrong("architectures", names, 'a list of names, such as ["LlamaForCausalLM"]')
    return names[0]


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(name, value, "an object of settings")
    return value


def _wrong(key: str, value: Any, must: str) -> ValueError:
    return ValueError(f"{key}={value!r} must be {must}")
