"""The Llama family (Llama 2, Llama 3.x, and models of their form such as SmolLM2)."""

from collections.abc import Mapping
from typing import Any

from paged_attn_layer._src.convert.gguf_names import GGUFNames
from paged_attn_layer._src.convert.rotary_rows import RotaryPairsToHalves
from paged_attn_layer._src.convert.weights import WeightRule, rename
from paged_attn_layer._src.models.decoder_config import DecoderConfig
from paged_attn_layer._src.models.decoder_family import decoder_family
from paged_attn_layer._src.models.read_decoder import read_attentions, read_pre_norm_decoder
from paged_attn_layer._src.models.weight_rules import ATTENTION, EMBEDDING, FINAL_NORM, MLP, head, layer_norm
from paged_cache import HFConfig


def read_config(config: HFConfig) -> DecoderConfig:
    """The config of a Llama model."""
    bias = config.flag("attention_bias", False)
    return read_llama_like(config, qkv_bias=bias, out_bias=bias, mlp_bias=config.flag("mlp_bias", False))


def read_llama_like(
    config: HFConfig, *, qkv_bias: bool = False, out_bias: bool = False, mlp_bias: bool = False
) -> DecoderConfig:
    """The config of a model in Llama's form: pre-norm layers of rotary attention and a gated MLP."""
    attentions = read_attentions(config, qkv_bias=qkv_bias, out_bias=out_bias)
    return read_pre_norm_decoder(config, attentions, mlp_bias=mlp_bias)


def weights(config: DecoderConfig) -> tuple[WeightRule, ...]:
    """The rules of a model in Llama's form."""
    return (
        EMBEDDING,
        layer_norm("input_layernorm", "attention_norm"),
        *ATTENTION,
        layer_norm("post_attention_layernorm", "mlp_norm"),
        *MLP,
        FINAL_NORM,
        *head(config),
    )


GGUF_TENSORS = (
    rename("token_embd.weight", "model.embed_tokens.weight"),
    rename("blk.{layer}.attn_norm.weight", "model.layers.{layer}.input_layernorm.weight"),
    rename("blk.{layer}.attn_v.{weight|bias}", "model.layers.{layer}.self_attn.v_proj.{weight|bias}"),
    rename("blk.{layer}.attn_output.{weight|bias}", "model.layers.{layer}.self_attn.o_proj.{weight|bias}"),
    rename("blk.{layer}.ffn_norm.weight", "model.layers.{layer}.post_attention_layernorm.weight"),
    rename(
        "blk.{layer}.ffn_{gate|up|down}.{weight|bias}", "model.layers.{layer}.mlp.{gate|up|down}_proj.{weight|bias}"
    ),
    rename("output_norm.weight", "model.norm.weight"),
    rename("output.weight", "lm_head.weight"),
)
"""The tensors that llama.cpp stores as Hugging Face does, but for their names: all but queries and keys."""


def gguf_tensors(config: Mapping[str, Any]) -> tuple[WeightRule, ...]:
    """The tensors of a file of architecture `llama`. It has the two rows of a rotary pair of Q and K side by side."""
    q_heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or q_heads
    q, k = "model.layers.{layer}.self_attn.q_proj.{weight|bias}", "model.layers.{layer}.self_attn.k_proj.{weight|bias}"
    return (
        *GGUF_TENSORS,
        rename("blk.{layer}.attn_q.{weight|bias}", q, RotaryPairsToHalves(q_heads)),
        rename("blk.{layer}.attn_k.{weight|bias}", k, RotaryPairsToHalves(kv_heads)),
    )


GGUF_BIASES = (("blk.0.attn_q.bias", "attention_bias"), ("blk.0.ffn_up.bias", "mlp_bias"))
"""Tensors that a file has if the key is true."""

FAMILY = decoder_family(
    architectures=("LlamaForCausalLM",),
    model_types=("llama",),
    read_config=read_config,
    weights=weights,
    gguf=GGUFNames(
        architecture="llama",
        tensors=gguf_tensors,
        switches=GGUF_BIASES,
    ),
)
