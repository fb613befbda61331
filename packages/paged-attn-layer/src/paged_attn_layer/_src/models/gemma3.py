"""The Gemma 3 family: text models, and the text part of models that see pictures too."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from paged_attn_layer._src.blocks.attention import AttentionConfig
from paged_attn_layer._src.convert.gguf_names import GGUFNames
from paged_attn_layer._src.convert.operations import Add
from paged_attn_layer._src.convert.weights import WeightRule, rename
from paged_attn_layer._src.models.decoder_config import DecoderConfig, LayerConfig
from paged_attn_layer._src.models.decoder_family import decoder_family
from paged_attn_layer._src.models.read_decoder import read_attentions, read_decoder, read_mlp, read_norm
from paged_attn_layer._src.models.weight_rules import ATTENTION, EMBEDDING, FINAL_NORM, MLP, head, layer_norm
from paged_cache import HFConfig


def read_config(config: HFConfig) -> DecoderConfig:
    """The config of a Gemma 3 model."""
    if config.get("use_bidirectional_attention"):
        raise NotImplementedError("use_bidirectional_attention=True is not supported; a decoder sees earlier tokens")
    if config.has("attn_logit_softcapping"):
        raise NotImplementedError("attn_logit_softcapping is not supported: no Gemma 3 has it; leave it out")
    config = config.replace({"rope_parameters": _rope_parameters(config), "rope_scaling": None})
    norm, mlp = read_norm(config, offset=1.0), read_mlp(config, act_key="hidden_activation")
    layers = [
        LayerConfig(attention=attention, mlp=mlp, pre_norm=norm, post_norm=norm) for attention in _attentions(config)
    ]
    decoder = read_decoder(config, layers, norm)
    cap = config.number("final_logit_softcapping") if config.has("final_logit_softcapping") else None
    return dataclasses.replace(decoder, embed_scale=decoder.hidden_size**0.5, logit_soft_cap=cap)


def _attentions(config: HFConfig) -> list[AttentionConfig]:
    norm, scale = read_norm(config, offset=1.0), config.number("query_pre_attn_scalar") ** -0.5
    bias = config.flag("attention_bias", False)
    attentions = read_attentions(config, qkv_bias=bias, out_bias=bias)
    return [dataclasses.replace(each, qk_norm=norm, softmax_scale=scale) for each in attentions]


def _rope_parameters(config: HFConfig) -> Mapping[str, Any]:
    """The rotary settings of both kinds of layers. `rope_theta` and `rope_scaling` are those of full attention."""
    given = HFConfig(config.mapping("rope_parameters"))
    full = {"rope_theta": config.number("rope_theta", 1_000_000.0), **given.mapping("full_attention")}
    local = {"rope_theta": config.number("rope_local_base_freq", 10_000.0), **given.mapping("sliding_attention")}
    return {"full_attention": {**full, **config.mapping("rope_scaling")}, "sliding_attention": local}


def weights(config: DecoderConfig) -> tuple[WeightRule, ...]:
    """The rules of a model with norms before and after each block."""
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


_GGUF_NORMS = {
    "attn_norm": "input_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def gguf_tensors(_config: Mapping[str, Any]) -> tuple[WeightRule, ...]:
    """The tensors of a file. Norms are stored as 1 + w, the factor itself."""
    layer = "model.layers.{layer}"
    norms = (
        rename(f"blk.{{layer}}.{name}.weight", f"{layer}.{hf_name}.weight", Add(-1.0))
        for name, hf_name in _GGUF_NORMS.items()
    )
    return (
        rename("token_embd.weight", "model.embed_tokens.weight"),
        *norms,
        rename("blk.{layer}.attn_{q|k|v}.{weight|bias}", f"{layer}.self_attn.{{q|k|v}}_proj.{{weight|bias}}"),
        rename("blk.{layer}.attn_output.{weight|bias}", f"{layer}.self_attn.o_proj.{{weight|bias}}"),
        rename("blk.{layer}.ffn_{gate|up|down}.weight", f"{layer}.mlp.{{gate|up|down}}_proj.weight"),
        rename("output_norm.weight", "model.norm.weight", Add(-1.0)),
        rename("output.weight", "lm_head.weight"),
    )


FAMILY = decoder_family(
    architectures=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    model_types=("gemma3_text",),
    read_config=read_config,
    weights=weights,
    gguf=GGUFNames(
        architecture="gemma3",
        tensors=gguf_tensors,
        settings=(
            ("attention.sliding_window", "sliding_window"),
            ("attention.sliding_window_pattern", "sliding_window_pattern"),
            ("rope.freq_base_swa", "rope_local_base_freq"),
            ("final_logit_softcapping", "final_logit_softcapping"),
        ),
        switches=(("blk.0.attn_q.bias", "attention_bias"),),
    ),
)
