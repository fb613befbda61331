"""The Llama family (Llama 2, Llama 3.x, and models of their form such as SmolLM2)."""

from collections.abc import Mapping
from typing import Any

from paged_attn_layer._src.convert.gguf_names import GGUFNames
from paged_attn_layer._src.convert.operations import RotaryPairsToHalves
from paged_attn_layer._src.convert.weights import WeightRule, linear, rename, unused
from paged_attn_layer._src.models.decoder import Decoder
from paged_attn_layer._src.models.decoder_config import DecoderConfig, read_decoder_config
from paged_attn_layer._src.models.family import Family
from paged_cache import HFConfig


def read_config(config: HFConfig) -> DecoderConfig:
    """The config of a Llama model."""
    bias = config.flag("attention_bias", False)
    return read_decoder_config(config, qkv_bias=bias, o_bias=bias, mlp_bias=config.flag("mlp_bias", False))


def weights(config: DecoderConfig) -> tuple[WeightRule, ...]:
    """The rules of a Llama model. Families of the same form share them."""
    tied = (rename("lm_head.weight", "embed.embedding"), unused("lm_head.weight"))  # for a file with the head alone
    return (
        rename("model.embed_tokens.weight", "embed.embedding"),
        rename("model.layers.{layer}.input_layernorm.weight", "layers.{layer}.attention_norm.scale"),
        *linear("model.layers.{layer}.self_attn.{q|k|v|o}_proj", "layers.{layer}.attention.{q|k|v|o}_proj"),
        rename("model.layers.{layer}.post_attention_layernorm.weight", "layers.{layer}.mlp_norm.scale"),
        *linear("model.layers.{layer}.mlp.{gate|up|down}_proj", "layers.{layer}.mlp.{gate|up|down}_proj"),
        rename("model.norm.weight", "norm.scale"),
        *(tied if config.tie_word_embeddings else (rename("lm_head.weight", "lm_head"),)),
        unused("model.layers.{layer}.self_attn.rotary_emb.inv_freq"),  # old checkpoints; follows from the config
    )


SHARDINGS = (
    ("embed.embedding", ("vocab", None)),
    ("lm_head", ("vocab", None)),
    ("layers.{layer}.attention.{q|k|v}_proj.kernel", (None, "kv_heads")),
    ("layers.{layer}.attention.{q|k|v}_proj.bias", ("kv_heads",)),
    ("layers.{layer}.attention.o_proj.kernel", ("kv_heads", None)),
    ("layers.{layer}.mlp.{gate|up}_proj.kernel", (None, "mlp")),
    ("layers.{layer}.mlp.{gate|up}_proj.bias", ("mlp",)),
    ("layers.{layer}.mlp.down_proj.kernel", ("mlp", None)),
)
"""The axes of a Llama model's weights. Query heads are split with the KV heads that they share."""


def axis_sizes(config: DecoderConfig) -> dict[str, int]:
    """How many parts each axis of `SHARDINGS` may be cut into."""
    return {"vocab": config.vocab_size, "kv_heads": config.num_key_value_heads, "mlp": config.intermediate_size}


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


FAMILY = Family(
    architectures=("LlamaForCausalLM",),
    model_types=("llama",),
    read_config=read_config,
    build=Decoder,
    weights=weights,
    shardings=SHARDINGS,
    axis_sizes=axis_sizes,
    gguf=GGUFNames(
        architecture="llama",
        tensors=gguf_tensors,
        switches=(("blk.0.attn_q.bias", "attention_bias"), ("blk.0.ffn_up.bias", "mlp_bias")),
    ),
)
