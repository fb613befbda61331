"""The gpt-oss family: attention sinks, a window in every other layer, biases, and experts with a clamped activation."""

import dataclasses

from paged_attn_layer._src.blocks.mlp import ClampedGLU
from paged_attn_layer._src.blocks.moe import MoEConfig
from paged_attn_layer._src.blocks.router import RouterConfig
from paged_attn_layer._src.convert.operations import Deinterleave
from paged_attn_layer._src.convert.weights import WeightRule, rename
from paged_attn_layer._src.models import llama
from paged_attn_layer._src.models.decoder_config import DecoderConfig, LayerConfig
from paged_attn_layer._src.models.decoder_family import decoder_family
from paged_attn_layer._src.models.read_decoder import read_attentions, read_decoder, read_mlp, read_norm
from paged_attn_layer._src.models.weight_rules import OURS, THEIRS, router
from paged_cache import HFConfig


def read_config(config: HFConfig) -> DecoderConfig:
    """The config of a gpt-oss model."""
    norm, bias = read_norm(config), config.flag("attention_bias")
    chosen = RouterConfig(
        num_experts=config.whole("num_local_experts"),
        experts_per_token=config.whole("num_experts_per_tok"),
        use_bias=True,
        renormalise=True,
    )
    glu = ClampedGLU(alpha=config.number("swiglu_alpha"), limit=config.number("swiglu_limit"))
    moe = MoEConfig(router=chosen, expert=dataclasses.replace(read_mlp(config, use_bias=True), activation=glu))
    layers = [
        LayerConfig(attention=dataclasses.replace(each, sinks=True), mlp=moe, pre_norm=norm)
        for each in read_attentions(config, qkv_bias=bias, out_bias=bias)
    ]
    return read_decoder(config, layers, norm)


def weights(config: DecoderConfig) -> tuple[WeightRule, ...]:
    """The rules of a gpt-oss model. Columns of the gate and of the way up take turns, and no matrix is transposed."""
    theirs, ours = f"{THEIRS}.mlp.experts", f"{OURS}.mlp.experts"
    names = tuple(f"{ours}.{name}" for name in ("gate_proj", "up_proj", "gate_bias", "up_bias"))
    return (
        *llama.weights(config),
        rename(f"{THEIRS}.self_attn.sinks", f"{OURS}.attention.sinks"),
        *router("mlp.router"),
        WeightRule((f"{theirs}.gate_up_proj",), names[:2], (Deinterleave(2),)),
        WeightRule((f"{theirs}.gate_up_proj_bias",), names[2:], (Deinterleave(2),)),
        rename(f"{theirs}.down_proj", f"{ours}.down_proj"),
        rename(f"{theirs}.down_proj_bias", f"{ours}.down_bias"),
    )


FAMILY = decoder_family(
    architectures=("GptOssForCausalLM",),
    model_types=("gpt_oss",),
    read_config=read_config,
    weights=weights,
)
