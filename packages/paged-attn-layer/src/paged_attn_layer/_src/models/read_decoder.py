"""Parts of a `DecoderConfig` from the keys of a config.json that families share.

A key that changes the result is honoured or refused. Keys that transformers' own class for the model does not read are
ignored, as they are there. A family's `read_config` puts the parts together:

    norm, mlp = read_norm(config), read_mlp(config)
    layers = [LayerConfig(attention=each, mlp=mlp, pre_norm=norm) for each in read_attentions(config)]
    return read_decoder(config, layers, norm)

and changes with `dataclasses.replace` what its models have otherwise.
"""

from collections.abc import Iterable

from paged_attn_layer._src.blocks.attention import AttentionConfig
from paged_attn_layer._src.blocks.mlp import MLPConfig
from paged_attn_layer._src.blocks.norm import NormConfig
from paged_attn_layer._src.models.decoder_config import DecoderConfig, LayerConfig
from paged_attn_layer._src.models.read_rope import read_max_positions, read_rope
from paged_cache import CacheSpec, HFConfig, KVShape, LayerGroup

_LAYER_TYPES = {"full": "full_attention", "window": "sliding_attention"}
"""Hugging Face's name of each kind of group that is supported."""


def read_norm(config: HFConfig, *, offset: float = 0.0) -> NormConfig:
    """RMS norm with `rms_norm_eps`."""
    return NormConfig(eps=config.number("rms_norm_eps") if config.says("rms_norm_eps") else 1e-6, offset=offset)


def read_mlp(config: HFConfig, *, act_key: str = "hidden_act", use_bias: bool = False) -> MLPConfig:
    """A gated MLP of `intermediate_size`, with the activation that `act_key` names."""
    return MLPConfig(
        hidden_size=config.whole("hidden_size"),
        intermediate_size=config.whole("intermediate_size"),
        activation=config.text(act_key, "silu"),
        use_bias=use_bias,
    )


def read_cap(config: HFConfig, key: str) -> float | None:
    """The bound on logits' magnitude that a key gives; `null` means none."""
    return config.number(key) if config.has(key) else None


def read_attentions(
    config: HFConfig,
    *,
    qkv_bias: bool = False,
    out_bias: bool = False,
    partial_rope: bool = False,
    interleaved_rope: bool = False,
) -> list[AttentionConfig]:
    """The attention of each layer: heads, window, rotary embedding, and which layers read the keys of another.

    Args:
        config: the config.json.
        qkv_bias: true if the family's projections to queries, keys and values add a bias.
        out_bias: the same of the projection back.
        partial_rope: true if its rotary embedding can turn a part of a head (`partial_rotary_factor`).
        interleaved_rope: true if its rotary embedding pairs neighbouring elements.

    Raises:
        ValueError: a key is missing, or has a value that means nothing; names it.
        NotImplementedError: a key asks for something that is not supported; names it.
    """
    spec = CacheSpec.from_hf_config(config)
    shared = dict(spec.shared_layers)
    groups = {layer: group for group in spec.groups for layer in group.layers}
    types = config.per_layer("layer_types") if config.has("layer_types") else [None] * spec.num_layers

    def attention(layer: int, group: LayerGroup) -> AttentionConfig:
        kv, layer_type = _supported_shape(group), types[layer] or _LAYER_TYPES[group.kind]
        return AttentionConfig(
            hidden_size=config.whole("hidden_size"),
            num_heads=config.whole("num_attention_heads"),
            num_kv_heads=kv.num_kv_heads,
            head_dim=kv.head_dim,
            rope=read_rope(config, kv.head_dim, layer_type, partial=partial_rope, interleaved=interleaved_rope),
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            stores_kv=layer not in shared,
            sliding_window=group.tokens or None,
        )

    return [attention(layer, groups[shared.get(layer, layer)]) for layer in range(spec.num_layers)]


def read_pre_norm_decoder(
    config: HFConfig, attentions: Iterable[AttentionConfig], *, mlp_bias: bool = False
) -> DecoderConfig:
    """The decoder of Llama's form: RMS norms before each of these attentions and before gated MLPs."""
    norm, mlp = read_norm(config), read_mlp(config, use_bias=mlp_bias)
    return read_decoder(config, [LayerConfig(attention=each, mlp=mlp, pre_norm=norm) for each in attentions], norm)


def read_decoder(config: HFConfig, layers: Iterable[LayerConfig], final_norm: NormConfig) -> DecoderConfig:
    """The decoder of these layers, with what is around them.

    Raises:
        ValueError: a key is missing, or has a value that means nothing; names it.
        NotImplementedError: a key asks for something that is not supported; names it.
    """
    if quantization := config.mapping("quantization_config"):
        raise NotImplementedError(
            f"quantization_config (quant_method={quantization.get('quant_method')!r}) is not supported in a Hugging "
            "Face directory; use the unquantised checkpoint, or a GGUF file"
        )
    return DecoderConfig(
        vocab_size=config.whole("vocab_size"),
        hidden_size=config.whole("hidden_size"),
        max_position_embeddings=read_max_positions(config),
        layers=tuple(layers),
        final_norm=final_norm,
        tie_word_embeddings=config.flag("tie_word_embeddings", False),
        shared_layers=CacheSpec.from_hf_config(config).shared_layers,
        end_token_ids=read_end_token_ids(config),
    )


def read_end_token_ids(config: HFConfig) -> frozenset[int]:
    """The tokens of `eos_token_id`: one or a list. A negative one, as some checkpoints have, is none."""
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(each, bool) or not isinstance(each, int) for each in ids):
        raise ValueError(f"eos_token_id={value!r} must be a token id or a list of token ids")
    return frozenset(each for each in ids if each >= 0)


def _supported_shape(group: LayerGroup) -> KVShape:
    """What a layer of the group stores, if it sees what a decoder's layer can see."""
    if group.kind not in _LAYER_TYPES or group.kv is None:
        raise NotImplementedError(f"layers with {group.kind} attention are not supported; full and windowed are")
    return group.kv
