"""The Gemma 4 family: text models, and the text part of models that see and hear too."""

import dataclasses

from paged_attn_layer._src.blocks.attention import AttentionConfig
from paged_attn_layer._src.blocks.mlp import MLPConfig
from paged_attn_layer._src.blocks.moe import MoEConfig
from paged_attn_layer._src.blocks.per_layer_input import PerLayerInputConfig
from paged_attn_layer._src.blocks.router import RouterConfig
from paged_attn_layer._src.convert.operations import Split, Transpose
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
    norm, inputs = read_norm(config), _per_layer_input(config)
    layers = [
        LayerConfig(
            attention=each,
            mlp=_experts(config, each) if config.flag("enable_moe_block", False) else _mlp(config, each),
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


def _experts(config: HFConfig, attention: AttentionConfig) -> MoEConfig:
    """Experts beside the MLP, each with norms of its own."""
    mlp, norm = _mlp(config, attention), read_norm(config)
    router = RouterConfig(
        num_experts=config.whole("num_experts"),
        experts_per_token=config.whole("top_k_experts"),
        norm=norm,
        logit_scale=mlp.hidden_size**-0.5,
        renormalise=True,
        use_expert_scale=True,
    )
    expert = dataclasses.replace(mlp, intermediate_size=config.whole("moe_intermediate_size"))
    return MoEConfig(router=router, expert=expert, shared=mlp, norm=norm)


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
        *_expert_weights(config),
    )


def _expert_weights(config: DecoderConfig) -> tuple[WeightRule, ...]:
    """The rules of layers with experts beside the MLP."""
    moe, ours = config.layers[0].mlp, f"{OURS}.mlp.experts"
    if not isinstance(moe, MoEConfig):
        return ()
    split = Split(axis=1, sizes=(moe.intermediate_size, moe.intermediate_size))
    both = (f"{ours}.gate_proj", f"{ours}.up_proj")
    return (
        *linear(f"{THEIRS}.mlp.{{gate|up|down}}_proj", f"{OURS}.mlp.shared.{{gate|up|down}}_proj"),
        layer_norm("pre_feedforward_layernorm", "mlp.shared_norm"),
        layer_norm("post_feedforward_layernorm_1", "mlp.shared_post_norm"),
        layer_norm("pre_feedforward_layernorm_2", "mlp.expert_norm"),
        layer_norm("post_feedforward_layernorm_2", "mlp.expert_post_norm"),
        rename(f"{THEIRS}.router.scale", f"{OURS}.mlp.router.norm.scale"),
        *linear(f"{THEIRS}.router.proj", f"{OURS}.mlp.router"),
        rename(f"{THEIRS}.router.per_expert_scale", f"{OURS}.mlp.router.expert_scale"),
        WeightRule((f"{THEIRS}.experts.gate_up_proj",), both, (split, Transpose())),
        rename(f"{THEIRS}.experts.down_proj", f"{ours}.down_proj", Transpose()),
    )


FAMILY = decoder_family(
    architectures=("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration"),
    model_types=("gemma4_text",),
    read_config=read_config,
    weights=weights,
)
