"""What of a model decides the size of its cache, and how a Hugging Face config.json says it."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Self

from paged_cache._src.manager.groups import LayerGroup

LEFT_OUT: Mapping[str, Mapping[str, Any]] = {
    "gemma2": {"sliding_window_pattern": 2},
    "gemma3_text": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window_pattern": 6},
    "llama": {"num_key_value_heads": None},  # as many as query heads
    "llama4_text": {"no_rope_layer_interval": 4},
}
"""What published files of a model type leave out, as transformers 5 has it in `configuration_*.py` of that type."""

ALL_WINDOWED = ("mistral", "mixtral", "ministral", "phi3", "starcoder2")
"""Model types whose every layer has the window, where the file has no `layer_types`."""
LAST_WINDOWED = ("qwen2", "qwen3")
"""Model types whose layers from `max_window_layers` on have the window, where `use_sliding_window` is true."""

NOT_PLANNED: Mapping[str, Sequence[str]] = {
    "an encoder's keys are not counted": ("is_encoder_decoder",),
    "keys of pictures are not counted": ("cross_attention_layers",),
    "what layers keep that is no keys and values is not counted": (
        *("mamba_d_state", "conv_L_cache", "linear_num_value_heads", "linear_attn_config"),
        *("full_attention_interval", "attn_layer_period", "attn_type_list", "block_types", "hybrid_override_pattern"),
        *("index_topk", "compress_ratios"),
    ),
    "layers must have KV heads of one number and size": (
        *("per_layer_config", "global_head_dim", "swa_num_key_value_heads", "block_configs"),
    ),
}
"""What is not planned, and the keys that say that a model has it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """What of a model decides the size of its cache; every layer has KV heads of the same number and size."""

    groups: tuple[LayerGroup, ...]
    """The layers that keep keys and values: one group for each way of seeing them, with all layers that see so."""
    num_kv_heads: int
    """KV heads of a layer; 1 for latent rows."""
    head_dim: int
    """Size of one head's key; of a latent row, its rank and the rotary part."""
    v_head_dim: int | None = None
    """Size of one head's value; `None` means `head_dim`."""
    latent: bool = False
    """Whether a value is the start of its key, and stored once (multi-head latent attention)."""
    assumed: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    """What the config left out and its model type implies, as `key=value`."""

    def __post_init__(self) -> None:
        if not self.groups or not all(group.layers for group in self.groups):
            raise ValueError(f"groups={self.groups} must be at least one group, each with the layers that are in it")

    @property
    def num_layers(self) -> int:
        """Layers that keep keys and values."""
        return sum(len(group.layers) for group in self.groups)

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> Self:
        """The shape of the model that a Hugging Face config.json describes; of its text, where it is nested.

        >>> shape = CacheSpec.from_hf_config({"num_hidden_layers": 2, "num_attention_heads": 8, "head_dim": 64,
        ...     "num_key_value_heads": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8})
        >>> [(group.kind, group.tokens, group.layers) for group in shape.groups], shape.num_kv_heads, shape.head_dim
        ([('window', 8, (0,)), ('full', 0, (1,))], 2, 64)

        Args:
            config: the parsed file. Change it to say what the file does not: `{**config, "head_dim": 128}`.

        Raises:
            ValueError: a key is missing, or has a value that makes no sense; names it.
            NotImplementedError: the model keeps something else than keys and values of one size in every layer.
        """
        settings = _Settings(config.get("text_config") or config)
        for limit, keys in NOT_PLANNED.items():
            for key in keys:
                if settings.get(key):
                    raise NotImplementedError(f"a model with {key} is not supported: {limit}")
        return cls(groups=_groups(_sights(settings)), **_heads(settings), assumed=tuple(settings.assumed))

    def equal_groups(self) -> tuple[LayerGroup, ...]:
        """The groups, cut so that none has more layers than the smallest had: what a cache with one pool serves well.

        A page takes room in as many layers as the largest group has, so groups of different sizes would waste most of
        the small ones' pages. The cut is that of vLLM's hybrid allocator; the last piece of a group may be smaller.
        """
        size = min(len(group.layers) for group in self.groups)
        return tuple(
            dataclasses.replace(group, layers=group.layers[start : start + size])
            for group in self.groups
            for start in range(0, len(group.layers), size)
        )


class _Settings:
    """A config's keys, and what its model type implies where it leaves them out; `null` counts as left out."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self.model_type = config.get("model_type")
        self.assumed: dict[str, None] = {}

    def get(self, key: str) -> Any:
        """The value, or `None`."""
        implied = LEFT_OUT.get(str(self.model_type), {})
        if self._config.get(key) is not None or key not in implied:
            return self._config.get(key)
        self.assumed[f"{key}={json.dumps(implied[key])}"] = None
        return implied[key]

    def has(self, key: str) -> bool:
        """Whether the config or its model type says something of this key, be it `null`."""
        return key in self._config or key in LEFT_OUT.get(str(self.model_type), {})

    def whole(self, key: str, least: int = 1) -> int:
        """A whole number of at least `least`."""
        value = self.get(key)
        if value is None:
            raise ValueError(f"the config has no {key}; add it to the mapping, or give --set {key}=N")
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{key}={value!r} must be a whole number of at least {least}; change it, or --set {key}=N")
        return value

    def whole_list(self, key: str) -> Sequence[Any]:
        """A list with an entry for each layer."""
        value, layers = self.get(key), self.whole("num_hidden_layers")
        if not isinstance(value, list) or len(value) != layers:
            raise ValueError(f"{key}={value!r} must be a list with an entry for each of {layers} layers")
        return value


def _heads(settings: _Settings) -> dict[str, Any]:
    """Number and sizes of KV heads."""
    if settings.get("kv_lora_rank") is not None:  # DeepSeek-V2, arXiv 2405.04434: the latent, then the rotary key
        rank = settings.whole("kv_lora_rank")
        width = rank + settings.whole("qk_rope_head_dim")
        return {"num_kv_heads": 1, "head_dim": width, "v_head_dim": rank, "latent": True}
    return {
        "num_kv_heads": _num_kv_heads(settings),
        "head_dim": _head_dim(settings),
        "v_head_dim": None if settings.get("v_head_dim") is None else settings.whole("v_head_dim"),
    }


def _num_kv_heads(settings: _Settings) -> int:
    if settings.get("num_key_value_heads") is None and settings.has("num_key_value_heads"):
        return settings.whole("num_attention_heads")  # `null` means that every query head has its own
    return settings.whole("num_key_value_heads")


def _head_dim(settings: _Settings) -> int:
    if settings.get("head_dim") is not None:
        return settings.whole("head_dim")
    hidden, heads = settings.whole("hidden_size"), settings.whole("num_attention_heads")
    if hidden % heads:
        raise ValueError(
            f"hidden_size={hidden} is not divisible by num_attention_heads={heads}; add head_dim, or --set head_dim=N"
        )
    return hidden // heads


def _groups(sights: Sequence[LayerGroup]) -> tuple[LayerGroup, ...]:
    """One group for each way of seeing, in order of its first layer."""
    return tuple(
        dataclasses.replace(sight, layers=tuple(layer for layer, one in enumerate(sights) if one == sight))
        for sight in dict.fromkeys(sights)
    )


def _sights(settings: _Settings) -> list[LayerGroup]:
    """What each layer that keeps keys sees, as a group without layers."""
    if settings.get("layer_types") is not None:
        sights = _named_sights(settings)
    elif settings.get("attention_chunk_size") is not None:
        sights = _chunked_sights(settings)
    else:
        sights = _window_sights(settings)
    if not settings.get("num_kv_shared_layers"):
        return sights
    shared = settings.whole("num_kv_shared_layers")  # Gemma 3n: the last layers read the keys of those before them
    if shared >= len(sights):
        raise ValueError(f"num_kv_shared_layers={shared} must be less than num_hidden_layers={len(sights)}")
    return sights[:-shared]


def _named_sights(settings: _Settings) -> list[LayerGroup]:
    """By `layer_types`."""
    names = settings.whole_list("layer_types")
    unknown = sorted({str(name) for name in names} - {"full_attention", "sliding_attention", "chunked_attention"})
    if unknown:
        raise NotImplementedError(
            f"layer_types {', '.join(unknown)} are not supported; full_attention, sliding_attention and "
            "chunked_attention are"
        )
    sights = {"full_attention": LayerGroup.full()}
    if "sliding_attention" in names:
        sights["sliding_attention"] = LayerGroup.window(settings.whole("sliding_window"))
    if "chunked_attention" in names:
        sights["chunked_attention"] = LayerGroup.chunked(settings.whole("attention_chunk_size"))
    return [sights[name] for name in names]


def _chunked_sights(settings: _Settings) -> list[LayerGroup]:
    """Llama 4: layers with rotary embedding see their chunk, those without see all."""
    layers, chunked = settings.whole("num_hidden_layers"), LayerGroup.chunked(settings.whole("attention_chunk_size"))
    if settings.get("no_rope_layers"):
        return [chunked if has_rope else LayerGroup.full() for has_rope in settings.whole_list("no_rope_layers")]
    return _every(settings.whole("no_rope_layer_interval"), layers, chunked)


def _window_sights(settings: _Settings) -> list[LayerGroup]:
    """By `sliding_window`, and what the model type says of it."""
    layers = settings.whole("num_hidden_layers")
    if not settings.get("sliding_window") or settings.get("use_sliding_window") is False:
        return [LayerGroup.full()] * layers
    window = LayerGroup.window(settings.whole("sliding_window"))
    if settings.get("sliding_window_pattern") is not None:
        return _every(settings.whole("sliding_window_pattern"), layers, window)
    if settings.model_type in ALL_WINDOWED:
        return [window] * layers
    if settings.model_type in LAST_WINDOWED:
        first = settings.whole("max_window_layers", least=0)
        return [LayerGroup.full() if layer < first else window for layer in range(layers)]
    raise ValueError(
        f"sliding_window={window.tokens}, but which layers of model_type={settings.model_type!r} have it is not known; "
        'add layer_types (["sliding_attention", "full_attention", ...]), or --set sliding_window=null if none has it'
    )


def _every(interval: int, layers: int, others: LayerGroup) -> list[LayerGroup]:
    """Full attention in every `interval`-th layer, and `others` between."""
    return [others if (layer + 1) % interval else LayerGroup.full() for layer in range(layers)]
