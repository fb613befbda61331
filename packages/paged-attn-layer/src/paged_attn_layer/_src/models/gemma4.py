"""The Gemma 4 family: text models, and the text part of models that see and hear too."""

import dataclasses

from paged_attn_layer._src.blocks.attention import AttentionConfig
from paged_attn_layer._src.blocks.mlp import MLPConfig
from paged_attn_layer._src.blocks.per_layer_input import PerLayerInputConfig
from paged_attn_layer._src.convert.weights import WeightRule, linear, rename, unused
from paged_attn_layer._src.models import gemma2
from paged_attn_layer._src.models.decoder_config import DecoderConfig, LayerConfig
from paged_attn_layer._src.models.decoder_family import decoder_family
from paged_attn_layer._src.models.read_decoder import read_attentions, read_cap, read_decoder, read_mlp, read_norm
from paged_attn_layer._src.models.weight_rules import OURS, THEIRS, layer_norm
from paged_cache import HFConfig


def read_config(config: HFConfig) -> DecoderConfig:
    """The config of a Gemma 4 model."""
    if config.get("use_bidirectional_attention") == "all":
        raise NotImplementedError('use_bidirectional_attention="all" is not supported; a decoder sees earlier tokens')
    if config.flag("enable_moe_block", False):
        raise NotImplementedError("enable_moe_block=True is not supported: layers with an MLP and experts are missing")
    norm, inputs = read_norm(config), _per_layer_input(config)
    layers = [
        LayerConfig(
            attention=each,
            mlp=_mlp(config, each),
            pre_norm=norm,
            post_norm=norm,
            per_layer_input=inputs,
            has_scalar=True,
        )
        for each in _attentions(config)
    ]
    decoder = read_decoder(config, layers, norm)
    return dataclasses.replace(
        decoder,
        embed_scale=decoder.hidden_size**0.5,
        logit_soft_cap=read_cap(config, "final_logit_softcapping"),
        per_layer_vocab_size=config.whole("vocab_size_per_layer_input") if inputs else None,
    )


def _attentions(config: HFConfig) -> list[AttentionConfig]:
    """Queries, keys and values are normalised, and logits not scaled. In full attention the values may be the keys."""
    norm, bias = read_norm(config), config.flag("attention_bias", False)
    same = config.flag("attention_k_eq_v", False)
    return [
        dataclasses.replace(
            each,
            qk_norm=norm,
            v_norm=dataclasses.replace(norm, use_scale=False),
            softmax_scale=1.0,
            values_are_keys=same and each.sliding_window is None,
        )
        for each in read_attentions(config, qkv_bias=bias, out_bias=bias)
    ]


def _mlp(config: HFConfig, attention: AttentionConfig) -> MLPConfig:
    """With `use_double_wide_mlp`, layers that read the keys of another are twice as wide."""
    mlp = read_mlp(config, act_key="hidden_activation")
    wide = config.flag("use_double_wide_mlp", False) and not attention.stores_kv
    return dataclasses.replace(mlp, intermediate_size=2 * mlp.intermediate_size) if wide else mlp


def _per_layer_input(config: HFConfig) -> PerLayerInputConfig | None:
    """`hidden_size_per_layer_input` of 0 or `null` means none."""
    if not config.get("hidden_size_per_layer_input"):
        return None
    return PerLayerInputConfig(
        hidden_size=config.whole("hidden_size"),
        size=config.whole("hidden_size_per_layer_input"),
        norm=read_norm(config),
        activation=config.text("hidden_activation"),
    )


def weights(config: DecoderConfig) -> tuple[WeightRule, ...]:
    """The rules of a Gemma 4 model. Files have projections to keys that no layer reads, where layers share keys."""
    return (
        *gemma2.weights(config),
        *(unused(f"model.layers.{layer}.self_attn.{{k|v}}_{{proj|norm}}.weight") for layer, _ in config.shared_layers),
        rename("model.embed_tokens_per_layer.weight", "per_layer_inputs.embed.embedding"),
        *linear("model.per_layer_model_projection", "per_layer_inputs.proj"),
        rename("model.per_layer_projection_norm.weight", "per_layer_inputs.norm.scale"),
        *linear(f"{THEIRS}.per_layer_input_gate", f"{OURS}.per_layer_input.gate_proj"),
        *linear(f"{THEIRS}.per_layer_projection", f"{OURS}.per_layer_input.out_proj"),
        layer_norm("post_per_layer_input_norm", "per_layer_input.norm"),
        rename(f"{THEIRS}.layer_scalar", f"{OURS}.scalar"),
    )


FAMILY = decoder_family(
    architectures=("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration"),
    model_types=("gemma4_text",),
    read_config=read_config,
    weights=weights,
)
