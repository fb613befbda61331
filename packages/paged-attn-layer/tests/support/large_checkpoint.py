"""A checkpoint of gigabytes, made quickly: as large as a test of memory needs, with nothing in it that matters."""

import json

import numpy as np

from paged_attn_layer._src.convert.lazy import LazyArray
from paged_attn_layer._src.convert.safetensors_file import write_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
"""2.2 GB in bfloat16; the embedding is the largest weight, with 262 MB."""


def shapes(config=CONFIG):
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    layers = range(config["num_hidden_layers"])
    return {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        **{f"model.layers.{n}.{name}.weight": shape for n in layers for name, shape in layer.items()},
        "model.norm.weight": (hidden,),
    }


def write_large(directory, dtype):
    """Writes the checkpoint. Returns the bytes of all weights, and of the largest."""
    row = (np.random.default_rng(0).normal(size=8192) / 50).astype(dtype)
    weights = {
        name: LazyArray.of_rows(
            shape,
            dtype,
            lambda start, stop, shape=shape: np.broadcast_to(
                row[: shape[-1]] if len(shape) > 1 else np.ones(stop - start, dtype), (stop - start, *shape[1:])
            ),
        )
        for name, shape in shapes().items()
    }
    (directory / "config.json").write_text(json.dumps(CONFIG))
    sizes = list(write_file(directory / "model.safetensors", weights))
    return sum(sizes), max(sizes)
