"""The GPT-2 family: an embedding of each position, LayerNorm, and biases in every projection."""

import dataclasses

from paged_attn_layer._src.blocks.attention import AttentionConfig
from paged_attn_layer._src.blocks.norm import NormConfig
from paged_attn_layer._src.convert.operations import Split
from paged_attn_layer._src.convert.weights import WeightRule, rename, unused
from paged_attn_layer._src.models.decoder_config import DecoderConfig, LayerConfig
from paged_attn_layer._src.models.decoder_family import decoder_family
from paged_attn_layer._src.models.read_decoder import read_attentions, read_decoder, read_mlp
from paged_attn_layer._src.models.weight_rules import OURS, head
from paged_cache import HFConfig


def read_config(config: HFConfig) -> DecoderConfig:
    """The config of a GPT-2 model."""
    if config.flag("add_cross_attention", False):
        raise NotImplementedError("add_cross_attention=True is not supported; GPT-2 alone has no encoder")
    inner = config.whole("intermediate_size", 4 * config.whole("hidden_size"))
    config = config.replace({"intermediate_size": inner, "num_key_value_heads": None, "head_dim": None})
    norm = NormConfig(kind="layer", eps=config.number("layer_norm_eps"), use_bias=True)
    mlp = dataclasses.replace(read_mlp(config, use_bias=True), gated=False)
    layers = [
        LayerConfig(attention=_attention(config, layer, attention), mlp=mlp, pre_norm=norm)
        for layer, attention in enumerate(read_attentions(config, qkv_bias=True, out_bias=True))
    ]
    return dataclasses.replace(read_decoder(config, layers, norm), learned_positions=True)


def _attention(config: HFConfig, layer: int, attention: AttentionConfig) -> AttentionConfig:
    """The attention of a layer, with the scale that the file asks for."""
    scale = attention.head_dim**-0.5 if config.flag("scale_attn_weights", True) else 1.0
    if config.flag("scale_attn_by_inverse_layer_idx", False):
        scale /= layer + 1
    return dataclasses.replace(attention, rope=None, softmax_scale=scale)


def weights(config: DecoderConfig) -> tuple[WeightRule, ...]:
    """The rules of a GPT-2 model. Its linear layers are stored as `[in, out]`; some files leave out `transformer.`."""
    return *_body("transformer.", config), *_body("", config), *head(config)


def _body(prefix: str, config: DecoderConfig) -> tuple[WeightRule, ...]:
    theirs, third = f"{prefix}h.{{layer}}", (config.hidden_size,) * 3

    def linear(source: str, target: str) -> tuple[WeightRule, WeightRule]:
        kernel, bias = f"{OURS}.{target}.kernel", f"{OURS}.{target}.bias"
        return rename(f"{theirs}.{source}.weight", kernel), rename(f"{theirs}.{source}.bias", bias)

    def qkv(kind: str, ours: str, axis: int) -> WeightRule:
        parts = tuple(f"{OURS}.attention.{name}_proj.{ours}" for name in "qkv")
        return WeightRule((f"{theirs}.attn.c_attn.{kind}",), parts, (Split(axis, third),))

    def norm(source: str, target: str) -> tuple[WeightRule, WeightRule]:
        return rename(f"{source}.weight", f"{target}.scale"), rename(f"{source}.bias", f"{target}.bias")

    return (
        rename(f"{prefix}wte.weight", "embed.embedding"),
        rename(f"{prefix}wpe.weight", "position_embed.embedding"),
        *norm(f"{theirs}.ln_1", f"{OURS}.attention_norm"),
        qkv("weight", "kernel", axis=1),
        qkv("bias", "bias", axis=0),
        *linear("attn.c_proj", "attention.o_proj"),
        *norm(f"{theirs}.ln_2", f"{OURS}.mlp_norm"),
        *linear("mlp.c_fc", "mlp.up_proj"),
        *linear("mlp.c_proj", "mlp.down_proj"),
        *norm(f"{prefix}ln_f", "norm"),
        unused(f"{theirs}.attn.bias"),  # the causal mask, in old files
        unused(f"{theirs}.attn.masked_bias"),
    )


FAMILY = decoder_family(
    architectures=("GPT2LMHeadModel",),
    model_types=("gpt2",),
    read_config=read_config,
    weights=weights,
)
