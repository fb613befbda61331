"""The Gemma 2 family: norms around attention and MLP, capped logits, a window in every other layer."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from paged_attn_layer._src.blocks.attention import AttentionConfig
from paged_attn_layer._src.convert.gguf_names import GGUFNames
from paged_attn_layer._src.convert.operations import Add
from paged_attn_layer._src.convert.weights import WeightRule, rename
from paged_attn_layer._src.models.decoder_config import DecoderConfig, LayerConfig
from paged_attn_layer._src.models.decoder_family import decoder_family
from paged_attn_layer._src.models.read_decoder import read_attentions, read_cap, read_decoder, read_mlp, read_norm
from paged_attn_layer._src.models.weight_rules import ATTENTION, EMBEDDING, FINAL_NORM, MLP, head, layer_norm
from paged_cache import HFConfig


def read_config(config: HFConfig) -> DecoderConfig:
    """The config of a Gemma 2 model."""
    cap = read_cap(config, "attn_logit_softcapping")
    return read_gemma(config, [dataclasses.replace(each, soft_cap=cap) for each in read_gemma_attentions(config)])


def read_gemma_attentions(config: HFConfig) -> list[AttentionConfig]:
    """The attention of each layer, with the scale that `query_pre_attn_scalar` says."""
    if config.get("use_bidirectional_attention"):
        raise NotImplementedError("use_bidirectional_attention=True is not supported; a decoder sees earlier tokens")
    bias, scale = config.flag("attention_bias", False), config.number("query_pre_attn_scalar") ** -0.5
    attentions = read_attentions(config, qkv_bias=bias, out_bias=bias)
    return [dataclasses.replace(each, softmax_scale=scale) for each in attentions]


def read_gemma(config: HFConfig, attentions: Iterable[AttentionConfig]) -> DecoderConfig:
    """The decoder of these layers of attention, with norms that multiply by 1 + w around them and around the MLPs."""
    norm, mlp = read_norm(config, offset=1.0), read_mlp(config, act_key="hidden_activation")
    layers = [LayerConfig(attention=each, mlp=mlp, pre_norm=norm, post_norm=norm) for each in attentions]
    return dataclasses.replace(
        read_decoder(config, layers, norm),
        embed_scale=math.sqrt(config.whole("hidden_size")),
        logit_soft_cap=read_cap(config, "final_logit_softcapping"),
    )


def weights(config: DecoderConfig) -> tuple[WeightRule, ...]:
    """The rules of a Gemma 2 or 3 model."""
    return (
        EMBEDDING,
        layer_norm("input_layernorm", "attention_norm"),
        *ATTENTION,
        layer_norm("post_attention_layernorm", "attention_post_norm"),
        layer_norm("pre_feedforward_layernorm", "mlp_norm"),
        *MLP,
        layer_norm("post_feedforward_layernorm", "mlp_post_norm"),
        FINAL_NORM,
        *head(config),
    )


_LAYER = "model.layers.{layer}"
_GGUF_NORMS = {
    "blk.{layer}.attn_norm": f"{_LAYER}.input_layernorm",
    "blk.{layer}.attn_q_norm": f"{_LAYER}.self_attn.q_norm",
    "blk.{layer}.attn_k_norm": f"{_LAYER}.self_attn.k_norm",
    "blk.{layer}.post_attention_norm": f"{_LAYER}.post_attention_layernorm",
    "blk.{layer}.ffn_norm": f"{_LAYER}.pre_feedforward_layernorm",
    "blk.{layer}.post_ffw_norm": f"{_LAYER}.post_feedforward_layernorm",
    "output_norm": "model.norm",
}


def gguf_tensors(_config: Mapping[str, Any]) -> tuple[WeightRule, ...]:
    """The tensors of a file of a Gemma 2 or 3 model. Norms are stored as 1 + w, the factor itself."""
    return (
        rename("token_embd.weight", "model.embed_tokens.weight"),
        *(rename(f"{theirs}.weight", f"{ours}.weight", Add(-1.0)) for theirs, ours in _GGUF_NORMS.items()),
        rename("blk.{layer}.attn_{q|k|v}.{weight|bias}", f"{_LAYER}.self_attn.{{q|k|v}}_proj.{{weight|bias}}"),
        rename("blk.{layer}.attn_output.{weight|bias}", f"{_LAYER}.self_attn.o_proj.{{weight|bias}}"),
        rename("blk.{layer}.ffn_{gate|up|down}.weight", f"{_LAYER}.mlp.{{gate|up|down}}_proj.weight"),
        rename("output.weight", "lm_head.weight"),
    )


def gguf_scale(config: Mapping[str, Any], *, scaled_by_hidden_size: int) -> Mapping[str, Any]:
    """The attention's scale, which files do not state: the head size's, but for the model with so many layers.

    llama.cpp (src/llama-model.cpp) knows the models of 27B by their layers too.
    """
    by_heads = config["hidden_size"] // config["num_attention_heads"]
    largest = config["num_hidden_layers"] == scaled_by_hidden_size
    return {"query_pre_attn_scalar": by_heads if largest else config.get("head_dim") or by_heads}


FAMILY = decoder_family(
    architectures=("Gemma2ForCausalLM",),
    model_types=("gemma2",),
    read_config=read_config,
    weights=weights,
    gguf=GGUFNames(
        architecture="gemma2",
        tensors=gguf_tensors,
        settings=(
            ("attention.sliding_window", "sliding_window"),
            ("attn_logit_softcapping", "attn_logit_softcapping"),
            ("final_logit_softcapping", "final_logit_softcapping"),
        ),
        implied=lambda config: gguf_scale(config, scaled_by_hidden_size=46),
        switches=(("blk.0.attn_q.bias", "attention_bias"),),
    ),
)
