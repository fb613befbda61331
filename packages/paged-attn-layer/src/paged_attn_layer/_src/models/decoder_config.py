"""What decides the arrays and the result of a decoder, and the keys of a config.json that its families share."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from paged_attn_layer._src.blocks.rope import RopeConfig
from paged_cache import CacheSpec, HFConfig

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
_LEAST, _MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes and switches of a `Decoder`. Static and hashable.

    Layer `l` maps hidden rows `x [tokens, hidden_size]` to `x + a`, then `x + a + m`, with

        a = o(attention(rotary(q(n1)), rotary(k(n1)), v(n1)))    n1 = rms_norm(x)
        m = down(silu(gate(n2)) * up(n2))                        n2 = rms_norm(x + a)

    Raises:
        ValueError: a size is below 1, the query heads are no multiple of the KV heads, `head_dim` is odd, or
            `rms_norm_eps` is not above 0 and finite.
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
    """True if the head that gives logits is the embedding."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    end_token_ids: frozenset[int] = frozenset()
    """Tokens that end an answer. One that is outside the vocabulary never comes."""
    sliding_windows: tuple[int | None, ...] = ()
    """For each layer the number of keys that a query sees, its own included; `None` for all. Empty: all, everywhere."""

    def __post_init__(self) -> None:
        for name in SIZES:
            size = getattr(self, name)
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}={size!r} must be a whole number of at least 1")
        if not _LEAST <= self.rms_norm_eps <= _MOST:  # the model computes with it in float32
            raise ValueError(f"rms_norm_eps={self.rms_norm_eps} must be above 0 and finite, in float32")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary turns pairs of its entries")
        self.rope.check_pairs(self.head_dim)
        if len(self.sliding_windows) not in (0, self.num_hidden_layers):
            raise ValueError(
                f"sliding_windows has {len(self.sliding_windows)} entries; it must have one for each of the "
                f"{self.num_hidden_layers} layers, or none"
            )

    def sliding_window(self, layer: int) -> int | None:
        """The number of keys that a query of this layer sees, its own included; `None` for all."""
        return self.sliding_windows[layer] if self.sliding_windows else None


def read_decoder_config(
    config: HFConfig, *, qkv_bias: bool = False, o_bias: bool = False, mlp_bias: bool = False
) -> DecoderConfig:
    """The config of a decoder in Llama's form, from the keys of a config.json that its families share.

    A key that changes the result is honoured or refused. Keys that transformers' own class for the model does not read
    are ignored, as they are there.

    Args:
        config: the config.json.
        qkv_bias: true if the family's projections to queries, keys and values add a bias.
        o_bias: the same of the projection back.
        mlp_bias: the same of the MLP's projections.

    Raises:
        ValueError: a key is missing, or has a value that means nothing; names it.
        NotImplementedError: a key asks for something that is not supported; names it.
    """
    _refuse_unsupported(config)
    spec = CacheSpec.from_hf_config(config)
    kv = spec.views()[0]
    return DecoderConfig(
        vocab_size=config.whole("vocab_size"),
        hidden_size=config.whole("hidden_size"),
        intermediate_size=config.whole("intermediate_size"),
        num_hidden_layers=config.whole("num_hidden_layers"),
        num_attention_heads=config.whole("num_attention_heads"),
        num_key_value_heads=kv.num_kv_heads,
        head_dim=kv.head_dim,
        max_position_embeddings=_max_positions(config),
        rms_norm_eps=config.number("rms_norm_eps") if config.says("rms_norm_eps") else 1e-6,
        rope=read_rope(config),
        tie_word_embeddings=config.flag("tie_word_embeddings", False),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        end_token_ids=read_end_token_ids(config),
        sliding_windows=_sliding_windows(spec),
    )


def read_end_token_ids(config: HFConfig) -> frozenset[int]:
    """The tokens of `eos_token_id`: one or a list. A negative one, as some checkpoints have, is none."""
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(each, bool) or not isinstance(each, int) for each in ids):
        raise ValueError(f"eos_token_id={value!r} must be a token id or a list of token ids")
    return frozenset(each for each in ids if each >= 0)


def read_rope(config: HFConfig) -> RopeConfig:
    """Rotary settings, as transformers 5 reads them.

    It writes `rope_parameters`, for all layers or for each type of layer. Before, it was `rope_theta` and
    `rope_scaling`, which is taken where a file has both.
    """
    rope = _rope_parameters(config)
    fraction = rope.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    if fraction != 1.0:
        raise NotImplementedError(f"partial_rotary_factor={fraction} is not supported; it must be 1.0")
    rope_type = rope.text("rope_type", rope.text("type", "default"))
    factors: dict[str, Any] = {name: rope.number(name) for name in _ROPE_FACTORS.get(rope_type, ())}
    if rope_type == "llama3":
        factors["original_max_position"] = _original_max_position(config, rope)
    divisors = tuple(config.get("rope_freq_factors") or ())  # a GGUF file's own; no config.json has it
    return RopeConfig(theta=_rope_theta(config, rope), rope_type=rope_type, freq_factors=divisors, **factors)


_ROPE_FACTORS = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
"""The numbers that each type of rotary embedding must be given: no value is right for all models."""


def _rope_parameters(config: HFConfig) -> HFConfig:
    rope = config.mapping("rope_scaling") or config.mapping("rope_parameters")
    by_type = {key: value for key, value in rope.items() if key.endswith("_attention")}
    if not by_type:
        return HFConfig(rope)
    first, *others = by_type.values()
    if not isinstance(first, Mapping) or any(other != first for other in others):
        raise NotImplementedError(f"rope_parameters={dict(rope)} is not supported; it must be the same for all layers")
    return HFConfig(first)


def _rope_theta(config: HFConfig, rope: HFConfig) -> float:
    given = next((each for each in (rope, config) if each.says("rope_theta")), None)
    return 10000.0 if given is None else given.number("rope_theta")


def _original_max_position(config: HFConfig, rope: HFConfig) -> int:
    """The key beside `rope_scaling` goes before the one in it; without one it is the longest sequence."""
    key = "original_max_position_embeddings"
    given = next((each for each in (config, rope) if each.says(key)), None)
    return _max_positions(config) if given is None else given.whole(key)


def _max_positions(config: HFConfig) -> int:
    return config.whole("max_position_embeddings", 2048)


def _refuse_unsupported(config: HFConfig) -> None:
    act = config.text("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise NotImplementedError(f"hidden_act={act!r} is not supported; only 'silu' is")
    if quantization := config.mapping("quantization_config"):
        raise NotImplementedError(
            f"quantization_config (quant_method={quantization.get('quant_method')!r}) is not supported in a Hugging "
            "Face directory; use the unquantised checkpoint, or a GGUF file"
        )
    if config.flag("rope_interleaved", False):
        raise NotImplementedError("rope_interleaved=True is not supported; rotary pairs entry i with i + head_dim / 2")


def _sliding_windows(spec: CacheSpec) -> tuple[int | None, ...]:
    windows: dict[int, int | None] = {}
    for group in spec.groups:
        if group.kind not in ("full", "window"):
            raise NotImplementedError(f"layers with {group.kind} attention are not supported; full and windowed are")
        windows |= dict.fromkeys(group.layers, group.tokens or None)
    return tuple(windows[layer] for layer in range(spec.num_layers)) if any(windows.values()) else ()
