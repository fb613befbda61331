"""What each layer of a Hugging Face model sees and stores."""

from collections.abc import Mapping, Sequence

from paged_cache._src.manager.groups import KVShape, LayerGroup
from paged_cache._src.spec.hf_config import HFConfig
from paged_cache._src.spec.model_types import (
    ALL_WINDOWED,
    LAST_IS_FULL,
    LAST_WINDOWED,
    NEVER_WINDOWED,
    NO_ROPE_WINDOWED,
)

PER_LAYER = ("head_dim", "num_key_value_heads")
"""Keys that `per_layer_config` may have for a layer."""

MOST_LAYERS = 10_000
"""More layers are a mistake: all that is counted by layer would take long before memory is found to be too small."""

NOT_SUPPORTED: Mapping[str, Sequence[str]] = {
    "an encoder's keys are not counted": ("is_encoder_decoder",),
    "keys of pictures are not counted": ("cross_attention_layers",),
    "what layers keep that is no keys and values is not counted": (
        *("mamba_d_state", "conv_L_cache", "linear_num_value_heads", "linear_attn_config"),
        *("full_attention_interval", "attn_layer_period", "attn_type_list", "block_types", "hybrid_override_pattern"),
        *("index_topk", "compress_ratios"),
    ),
    "how its layers' KV heads differ is not known": ("swa_num_key_value_heads", "block_configs"),
}
"""What is not supported, and the keys that say that a model has it."""

_OLD_NAMES = {"attention": "full_attention"}
"""Older names in `layer_types`."""

Layer = tuple[LayerGroup, KVShape]
"""What a layer sees, as a group without layers, and what it stores."""


def check_supported(config: HFConfig) -> None:
    """Refuse a model whose cache is not known to be keys and values alone.

    Raises:
        NotImplementedError: names the key that says so.
    """
    for limit, keys in NOT_SUPPORTED.items():
        for key in keys:
            if config.get(key) and not (key == "mamba_d_state" and _has_attention_alone(config)):
                raise NotImplementedError(f"a model with {key} is not supported: {limit}")


def _has_attention_alone(config: HFConfig) -> bool:
    """True if the file says of every layer that it is attention: a dense Granite 4 has the keys of Mamba too."""
    return config.has("layer_types") and {*map(str, config.per_layer("layer_types"))} <= {"attention", "full_attention"}


def layers_of(config: HFConfig) -> list[Layer]:
    """What each layer sees and stores, in the model's order.

    Raises:
        ValueError: a key is missing or makes no sense, or there are more than `MOST_LAYERS` layers.
    """
    if (layers := config.whole("num_hidden_layers")) > MOST_LAYERS:
        raise ValueError(f"num_hidden_layers={layers} must be at most {MOST_LAYERS}")
    sights = _sights(config)
    if config.model_type in LAST_IS_FULL and sights[-1].kind != "full":
        raise ValueError(f"layer_types of {config.model_type} must end with full_attention, not {sights[-1].kind}")
    if config.has("per_layer_config"):
        return list(zip(sights, _shapes_by_layer(config), strict=True))
    shape, of_full = _shape(config), _shape_of_full(config)
    return [(sight, of_full if sight.kind == "full" else shape) for sight in sights]


def shared_layers_of(config: HFConfig, layers: Sequence[Layer]) -> tuple[tuple[int, int], ...]:
    """Gemma 3n and 4: each of the last layers reads the keys of the last earlier layer that sees the same."""
    if not config.get("num_kv_shared_layers"):
        return ()
    shared = config.whole("num_kv_shared_layers")
    if shared >= len(layers):
        raise ValueError(f"num_kv_shared_layers={shared} must be less than num_hidden_layers={len(layers)}")
    first = len(layers) - shared
    last = {layer: index for index, layer in enumerate(layers[:first])}
    if missing := next((layer for layer in layers[first:] if layer not in last), None):
        raise ValueError(
            f"num_kv_shared_layers={shared}, but none of the first {first} layers is of the kind {missing[0].kind!r}, "
            "whose keys the last ones read"
        )
    return tuple((index, last[layer]) for index, layer in enumerate(layers[first:], first))


def _shape(config: HFConfig) -> KVShape:
    """What a layer stores."""
    if config.has("kv_lora_rank"):  # DeepSeek-V2, arXiv 2405.04434: the latent, then the rotary key
        rank = config.whole("kv_lora_rank")
        width = rank + config.whole("qk_rope_head_dim")
        return KVShape(num_kv_heads=1, head_dim=width, v_head_dim=rank, latent=True)
    return KVShape(
        num_kv_heads=_num_kv_heads(config),
        head_dim=_head_dim(config),
        v_head_dim=config.whole("v_head_dim") if config.has("v_head_dim") else None,
    )


def _shapes_by_layer(config: HFConfig) -> list[KVShape]:
    """What each layer stores, by `per_layer_config`: for some layers, keys that differ from those of the others."""
    shapes = [_shape(config)] * config.whole("num_hidden_layers")
    overrides = HFConfig(config.mapping("per_layer_config"))
    for name in config.mapping("per_layer_config"):
        values = overrides.mapping(name)
        layer = int(name) if name.isdecimal() else len(shapes)
        if layer >= len(shapes):
            raise ValueError(f"per_layer_config has the key {name!r}; it must be a layer, in 0..{len(shapes) - 1}")
        if unknown := sorted(set(values) - set(PER_LAYER)):
            raise NotImplementedError(
                f"per_layer_config has {', '.join(unknown)} for layer {layer}; only {', '.join(PER_LAYER)} may differ"
            )
        shapes[layer] = _shape(config.replace(values))
    return shapes


def _shape_of_full(config: HFConfig) -> KVShape:
    """What a layer stores that sees all keys; Gemma 4 has other heads there."""
    if not config.has("global_head_dim"):
        return _shape(config)
    few = config.has("num_global_key_value_heads") and config.flag("attention_k_eq_v", False)
    heads = config.whole("num_global_key_value_heads") if few else _num_kv_heads(config)
    return KVShape(num_kv_heads=heads, head_dim=config.whole("global_head_dim"))


def _num_kv_heads(config: HFConfig) -> int:
    if not config.has("num_key_value_heads") and config.says("num_key_value_heads"):
        return config.whole("num_attention_heads")  # `null` means that every query head has its own
    return config.whole("num_key_value_heads")


def _head_dim(config: HFConfig) -> int:
    if config.has("head_dim"):
        return config.whole("head_dim")
    hidden, heads = config.whole("hidden_size"), config.whole("num_attention_heads")
    if hidden % heads:
        raise ValueError(f"hidden_size={hidden} is not divisible by num_attention_heads={heads}; add head_dim")
    return hidden // heads


def _sights(config: HFConfig) -> list[LayerGroup]:
    """What each layer sees, as a group without layers."""
    if config.has("layer_types"):
        return _named_sights(config)
    if config.has("attention_chunk_size"):
        return _chunked_sights(config)
    return _window_sights(config)


def _named_sights(config: HFConfig) -> list[LayerGroup]:
    """By `layer_types`."""
    names = [_OLD_NAMES.get(str(name), str(name)) for name in config.per_layer("layer_types")]
    unknown = sorted({*names} - {"full_attention", "sliding_attention", "chunked_attention"})
    if unknown:
        raise NotImplementedError(
            f"layer_types {', '.join(unknown)} are not supported; full_attention, sliding_attention and "
            "chunked_attention are"
        )
    sights = {"full_attention": LayerGroup.full()}
    if "sliding_attention" in names:
        used = config.flag("use_sliding_window", True)
        sights["sliding_attention"] = LayerGroup.window(config.whole("sliding_window")) if used else LayerGroup.full()
    if "chunked_attention" in names:
        sights["chunked_attention"] = LayerGroup.chunked(config.whole("attention_chunk_size"))
    return [sights[name] for name in names]


def _chunked_sights(config: HFConfig) -> list[LayerGroup]:
    """Llama 4: layers with rotary embedding see their chunk, those without see all."""
    chunked = LayerGroup.chunked(config.whole("attention_chunk_size"))
    return [chunked if has_rope else LayerGroup.full() for has_rope in config.layers_with_rope()]


def _window_sights(config: HFConfig) -> list[LayerGroup]:
    """By `sliding_window`, and what the model type says of it."""
    layers = config.whole("num_hidden_layers")
    if not _has_window(config):
        return [LayerGroup.full()] * layers
    window = LayerGroup.window(config.whole("sliding_window"))
    if config.has("sliding_window_pattern"):
        sights = _every(config.whole("sliding_window_pattern"), layers, window)
        return [*sights[:-1], LayerGroup.full()] if config.model_type in LAST_IS_FULL else sights
    if config.model_type in ALL_WINDOWED:
        return [window] * layers
    if config.model_type in LAST_WINDOWED:
        first = config.whole("max_window_layers", least=0)
        return [LayerGroup.full() if layer < first else window for layer in range(layers)]
    if config.model_type in NO_ROPE_WINDOWED:
        return [LayerGroup.full() if has_rope else window for has_rope in config.layers_with_rope()]
    raise ValueError(
        f"sliding_window={window.tokens}, but which layers of model_type={config.model_type!r} have it is not known; "
        'add layer_types (["sliding_attention", "full_attention", ...]), or set sliding_window to null if none has it'
    )


def _has_window(config: HFConfig) -> bool:
    """True if `sliding_window` counts."""
    return (
        config.model_type not in NEVER_WINDOWED
        and config.flag("use_sliding_window", True)
        and bool(config.get("sliding_window"))
    )


def _every(interval: int, layers: int, others: LayerGroup) -> list[LayerGroup]:
    """Full attention in every `interval`-th layer, and `others` between."""
    return [others if (layer + 1) % interval else LayerGroup.full() for layer in range(layers)]
