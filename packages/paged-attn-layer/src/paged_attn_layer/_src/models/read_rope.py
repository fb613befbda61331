"""Rotary settings of a config.json.

transformers turns with other frequencies when a sequence gets longer than the model was trained for (`dynamic`,
`longrope`). Keys in pages are turned already, so here the frequencies of a model never change:

    without `max_positions`   those of sequences up to the trained length, which is then the model's longest
    with `max_positions`      those that transformers uses for a sequence of that length, for every sequence

`max_positions` is a key of ours, which no file has: `read_config({**config, "max_positions": 65536})`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from paged_attn_layer._src.blocks.rope import RopeConfig
from paged_cache import HFConfig

Fields = dict[str, Any]
"""Fields of a `RopeConfig`."""


def read_rope(
    config: HFConfig,
    head_dim: int,
    layer_type: str = "full_attention",
    *,
    partial: bool = False,
    interleaved: bool = False,
) -> RopeConfig | None:
    """Rotary settings of the layers of one type, as transformers 5 reads them; `None` if they have no rotary embedding.

    It writes `rope_parameters`, for all layers or for each type of layer. Before, it was `rope_theta` and
    `rope_scaling`, which is taken where a file has both.

    Args:
        config: the config.json.
        head_dim: size of the layers' heads.
        layer_type: their name in `layer_types`.
        partial: true if the family's models can turn a part of a head (`partial_rotary_factor`).
        interleaved: true if the family pairs neighbouring elements.

    Raises:
        ValueError: a key is missing, or has a value that means nothing; names it.
        NotImplementedError: a key asks for something that is not supported; names it.
    """
    if config.flag("rope_interleaved", False):
        raise NotImplementedError(
            "rope_interleaved=True is not supported; leave it out: the family decides what is a pair"
        )
    rope = _parameters(config, layer_type)
    if rope is None:
        return None
    rope_type = _rope_type(rope)
    if rope_type not in _READERS:
        raise NotImplementedError(f"rope_type={rope_type!r} is not supported; {', '.join(_READERS)} are")
    divisors = tuple(config.get("rope_freq_factors") or ())  # a GGUF file's own; no config.json has it
    fields: Fields = {
        "theta": _theta(config, rope),
        "freq_factors": divisors,
        "rotary_dim": _rotary_dim(config, rope, head_dim, partial),
        "interleaved": interleaved,
    }
    return RopeConfig(**(fields | _READERS[rope_type](config, rope, fields["rotary_dim"] or head_dim)))


def read_max_positions(config: HFConfig) -> int:
    """The longest sequence of the model: `max_positions` if given, else the length that its frequencies are for.

    Raises:
        ValueError: `max_positions` is more than the model can do.
    """
    longest = read_trained_positions(config)
    ropes = [rope for rope in map(HFConfig, _all_parameters(config)) if rope is not None]
    if not config.has("max_positions"):
        trained = (_original_max_position(config, rope) for rope in ropes if _rope_type(rope) == "longrope")
        return min([longest, *trained])
    given = config.whole("max_positions")
    if given > longest and not any(_rope_type(rope) == "dynamic" for rope in ropes):
        raise ValueError(f"max_positions={given} must be at most max_position_embeddings={longest}")
    return given


def read_trained_positions(config: HFConfig) -> int:
    """`max_position_embeddings`, from which transformers computes the frequencies of some types."""
    return config.whole("max_position_embeddings", 2048)


def yarn_mscale(factor: float, multiplier: float = 1.0) -> float:
    """The factor that yarn puts on attention for sequences `factor` times longer (arXiv 2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1


def read_latent_scale(config: HFConfig) -> float:
    """The factor on the softmax scale of latent attention for longer sequences (DeepSeek's `mscale_all_dim`)."""
    (rope,) = _all_parameters(config)
    settings = HFConfig(rope)
    if _rope_type(settings) == "default" or not settings.get("mscale_all_dim"):
        return 1.0
    return yarn_mscale(settings.number("factor"), settings.number("mscale_all_dim")) ** 2


def read_yarn_factor(config: HFConfig, rope: HFConfig) -> float:
    """How many times longer than trained for the sequences get; `null` means what the two lengths say."""
    if rope.says("factor") and not rope.has("factor"):
        return read_trained_positions(config) / _original_max_position(config, rope)
    return rope.number("factor")


def _default(_config: HFConfig, _rope: HFConfig, _dim: int) -> Fields:
    return {}


def _linear(_config: HFConfig, rope: HFConfig, _dim: int) -> Fields:
    return {"rope_type": "linear", "factor": rope.number("factor")}


def _proportional(_config: HFConfig, rope: HFConfig, _dim: int) -> Fields:
    return {"rope_type": "proportional", "factor": rope.number("factor", 1.0)}


def _llama3(config: HFConfig, rope: HFConfig, _dim: int) -> Fields:
    numbers = {name: rope.number(name) for name in ("factor", "low_freq_factor", "high_freq_factor")}
    return {"rope_type": "llama3", **numbers, "original_max_position": _original_max_position(config, rope)}


def _yarn(config: HFConfig, rope: HFConfig, _dim: int) -> Fields:
    factor = read_yarn_factor(config, rope)
    attention_factor = yarn_mscale(factor)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        over, under = rope.number("mscale"), rope.number("mscale_all_dim")
        attention_factor = yarn_mscale(factor, over) / yarn_mscale(factor, under)
    return {
        "rope_type": "yarn",
        "factor": factor,
        "attention_factor": rope.number("attention_factor", attention_factor),
        "beta_fast": rope.number("beta_fast", 32.0) if rope.get("beta_fast") else 32.0,
        "beta_slow": rope.number("beta_slow", 1.0) if rope.get("beta_slow") else 1.0,
        "truncate": rope.flag("truncate", True),
        "original_max_position": _original_max_position(config, rope),
    }


def _longrope(config: HFConfig, rope: HFConfig, _dim: int) -> Fields:
    """ArXiv 2402.13753: a divisor for each pair, one set for short sequences and one for long ones."""
    original = _original_max_position(config, rope)
    factor = rope.number("factor", read_trained_positions(config) / original)
    attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    key = "long_factor" if config.has("max_positions") and config.whole("max_positions") > original else "short_factor"
    return {
        "freq_factors": _divisors(rope, key),
        "attention_factor": rope.number("attention_factor", attention_factor),
    }


def _dynamic(config: HFConfig, rope: HFConfig, dim: int) -> Fields:
    """A larger base for longer sequences."""
    trained, factor = read_trained_positions(config), rope.number("factor")
    longer = max(1.0, config.whole("max_positions", trained) / trained)
    return {"theta": _theta(config, rope) * (factor * longer - (factor - 1)) ** (dim / (dim - 2))}


_READERS: Mapping[str, Callable[[HFConfig, HFConfig, int], Fields]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "proportional": _proportional,
}
"""Reads the keys of each type of rotary embedding, for a number of turning elements. What has no right value for all
models must be given."""


def _all_parameters(config: HFConfig) -> list[Mapping[str, Any]]:
    """The settings of each type of layer, or the one of all."""
    rope = config.mapping("rope_scaling") or config.mapping("rope_parameters")
    by_type = [value for key, value in rope.items() if key.endswith("_attention")]
    return [value for value in by_type if value is not None] if by_type else [rope]


def _parameters(config: HFConfig, layer_type: str) -> HFConfig | None:
    """The settings of one type of layer; `None` if the file gives `null`."""
    rope = config.mapping("rope_scaling") or config.mapping("rope_parameters")
    if not any(key.endswith("_attention") for key in rope):
        return HFConfig(rope)
    if layer_type not in rope:
        raise ValueError(f"rope_parameters has settings for {', '.join(rope)}; it must have them for {layer_type} too")
    nested = HFConfig(rope)
    return HFConfig(nested.mapping(layer_type)) if nested.has(layer_type) else None


def _rope_type(rope: HFConfig) -> str:
    return rope.text("rope_type", rope.text("type", "default"))


def _theta(config: HFConfig, rope: HFConfig) -> float:
    given = next((each for each in (rope, config) if each.says("rope_theta")), None)
    return 10000.0 if given is None else given.number("rope_theta")


def _rotary_dim(config: HFConfig, rope: HFConfig, head_dim: int, partial: bool) -> int | None:
    fraction = rope.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    if fraction == 1.0:
        return None
    if _rope_type(rope) == "proportional":
        return 2 * int(fraction * head_dim / 2)
    if not partial:
        raise NotImplementedError(f"partial_rotary_factor={fraction} is not supported for this family; it must be 1.0")
    return int(fraction * head_dim)


def _original_max_position(config: HFConfig, rope: HFConfig) -> int:
    """The key beside `rope_scaling` goes before the one in it; without one it is the longest sequence."""
    key = "original_max_position_embeddings"
    given = next((each for each in (config, rope) if each.says(key)), None)
    return read_trained_positions(config) if given is None else given.whole(key)


def _divisors(rope: HFConfig, key: str) -> tuple[float, ...]:
    values = rope.get(key)
    if not isinstance(values, list) or any(
        isinstance(each, bool) or not isinstance(each, int | float) for each in values
    ):
        raise ValueError(f"{key}={values!r} must be a list of numbers, one for each pair of elements that turn")
    return tuple(map(float, values))
