"""The facts about a model that decide its arrays and its result, read from a Hugging Face config."""

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any

from paged_attn_layer._src.blocks.rope import RopeConfig

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")

# What transformers assumes where a config.json is silent (transformers.models.{llama,mistral,qwen2}.configuration_*).
_DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"attention_bias": False},
    "MistralForCausalLM": {"num_key_value_heads": 8, "sliding_window": 4096},
    "Qwen2ForCausalLM": {"num_key_value_heads": 32, "use_sliding_window": False, "max_window_layers": 28},
}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_KINDS = (
    ((*_REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings"), int, "an int of at least 1"),
    (("rms_norm_eps", "rope_theta"), numbers.Real, "a number, not 0"),
    (("rope_scaling", "rope_parameters", "quantization_config"), Mapping, "an object of settings"),
)
"""What a config's settings must be, where it has them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and switches of a Llama-family decoder.

    Layer `l` maps hidden rows `x [tokens, hidden_size]` to `x + a`, then `x + a + m`, with

        a = o(attention(rotary(q(n1)), rotary(k(n1)), v(n1)))    n1 = rms_norm(x)
        m = down(silu(gate(n2)) * up(n2))                        n2 = rms_norm(x + a)

    Raises:
        ValueError: a size is below 1, the query heads are no multiple of the KV heads, or `head_dim` is odd.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    """The longest sequence that the model was trained for, in tokens."""
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    """Whether the head that gives logits is the embedding."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    sliding_windows: tuple[int | None, ...] = ()
    """Per layer how many keys a query sees, itself included; `None` for all. Empty means all in every layer."""

    def __post_init__(self) -> None:
        for name in (*_REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings"):
            size = getattr(self, name)
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}={size!r} must be an int of at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary turns pairs of its entries")
        if len(self.sliding_windows) not in (0, self.num_hidden_layers):
            raise ValueError(
                f"sliding_windows has {len(self.sliding_windows)} entries; it must have one for each of the "
                f"{self.num_hidden_layers} layers, or none"
            )

    def sliding_window(self, layer: int) -> int | None:
        """How many keys a query of this layer sees, itself included; `None` for all."""
        return self.sliding_windows[layer] if self.sliding_windows else None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """The config that a Hugging Face `config.json` describes.

        Every setting that changes these models' result is honoured or refused. Keys that transformers' own classes
        for the architecture do not read are ignored, as they are there.

        Raises:
            ValueError: a setting is missing or means nothing.
            NotImplementedError: the architecture, or a setting of it, is not supported; names it.
        """
        architecture = _architecture(config)
        settings = {**_DEFAULTS[architecture], **config}
        missing = [name for name in _REQUIRED if settings.get(name) is None]
        if missing:
            raise ValueError(f"the config has no {', '.join(missing)}; a config.json of {architecture} states them")
        _check_kinds(settings)
        _refuse_unsupported(settings)
        heads = settings["num_attention_heads"]
        bias = architecture == "LlamaForCausalLM" and bool(settings["attention_bias"])
        return cls(
            **{name: settings[name] for name in _REQUIRED},
            num_key_value_heads=settings.get("num_key_value_heads") or heads,
            head_dim=settings.get("head_dim") or settings["hidden_size"] // heads,
            max_position_embeddings=settings.get("max_position_embeddings") or 2048,
            rms_norm_eps=float(settings.get("rms_norm_eps", 1e-6)),
            rope=_rope(settings),
            tie_word_embeddings=bool(settings.get("tie_word_embeddings", False)),
            qkv_bias=bias or architecture == "Qwen2ForCausalLM",
            o_bias=bias,
            mlp_bias=architecture == "LlamaForCausalLM" and bool(settings.get("mlp_bias", False)),
            sliding_windows=_sliding_windows(architecture, settings),
        )


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or [config.get("model_type", "none given")]
    if not isinstance(names, list):
        raise ValueError(f"architectures={names!r} must be a list, such as ['LlamaForCausalLM']")
    if names[0] not in SUPPORTED_ARCHITECTURES:
        raise NotImplementedError(
            f"architecture {names[0]!r} is not supported; supported are {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    return names[0]


def _check_kinds(settings: Mapping[str, Any]) -> None:
    """Refuse what cannot be computed with; a setting that is `null` counts as left out."""
    for names, kinds, wanted in _KINDS:
        for name in names:
            value = settings.get(name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, kinds) or value == 0):
                raise ValueError(f"{name}={value!r} must be {wanted}")


def _refuse_unsupported(settings: Mapping[str, Any]) -> None:
    if settings.get("hidden_act", "silu") not in ("silu", "swish"):
        raise NotImplementedError(f"hidden_act={settings['hidden_act']!r} is not supported; only 'silu' is")
    if settings.get("quantization_config"):
        method = settings["quantization_config"].get("quant_method")
        raise NotImplementedError(
            f"quantization_config (quant_method={method!r}) is not supported in a Hugging Face directory; "
            "use the unquantised checkpoint, or a GGUF file"
        )
    if settings.get("rope_interleaved"):
        raise NotImplementedError("rope_interleaved=True is not supported; rotary pairs entry i with i + head_dim / 2")


def _rope(settings: Mapping[str, Any]) -> RopeConfig:
    """Rotary settings. transformers 5 writes `rope_parameters`; before, it was `rope_theta` and `rope_scaling`."""
    rope = {**(settings.get("rope_scaling") or {}), **(settings.get("rope_parameters") or {})}
    fraction = rope.get("partial_rotary_factor", settings.get("partial_rotary_factor", 1.0))
    if fraction != 1.0:
        raise NotImplementedError(f"partial_rotary_factor={fraction} is not supported; it must be 1.0")
    numbers = {name: rope[name] for name in ("factor", "low_freq_factor", "high_freq_factor") if name in rope}
    if "original_max_position_embeddings" in rope:
        numbers["original_max_position"] = rope["original_max_position_embeddings"]
    return RopeConfig(
        theta=float(rope.get("rope_theta", settings.get("rope_theta", 10000.0))),
        rope_type=rope.get("rope_type", rope.get("type", "default")),
        **numbers,
    )


def _sliding_windows(architecture: str, settings: Mapping[str, Any]) -> tuple[int | None, ...]:
    layers, window = settings["num_hidden_layers"], settings.get("sliding_window")
    if architecture == "MistralForCausalLM":
        return (window,) * layers if window else ()
    if architecture != "Qwen2ForCausalLM" or not settings["use_sliding_window"] or not window:
        return ()
    kinds = settings.get("layer_types") or [
        "sliding_attention" if layer >= settings["max_window_layers"] else "full_attention" for layer in range(layers)
    ]
    unknown = sorted(set(kinds) - {"sliding_attention", "full_attention"})
    if unknown:
        raise NotImplementedError(f"layer_types {unknown} are not supported; only sliding and full attention are")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
