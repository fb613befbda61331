"""Tiny models as numpy arrays under Hugging Face names, written as a directory or as a GGUF file."""

import json

import gguf
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from paged_attn_layer import read_config
from paged_attn_layer._src.convert.lazy import LazyArray
from paged_attn_layer._src.convert.safetensors_file import write_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000.0,
}
_LATENT = {
    "num_key_value_heads": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 6,
    "first_k_dense_replace": 1,
    "q_lora_rank": 6,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 4,
}
FAMILY_KEYS = {
    "deepseek_v2": _LATENT,
    "deepseek_v3": {**_LATENT, "n_group": 2, "topk_group": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6},
    "granitemoehybrid": {"num_local_experts": 0, "layer_types": ["full_attention"] * 2},
}
"""Keys by model type that a family's config must have beside `CONFIG`."""
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def config_of(family, **settings):
    """The keys of a tiny model of a family."""
    model_type = family.model_types[0]
    return {**CONFIG, "architectures": list(family.architectures), **FAMILY_KEYS.get(model_type, {}), **settings}


def read_tiny(model_type, **settings):
    """The config that our family of a model type makes of `CONFIG` with these settings."""
    keys = FAMILY_KEYS.get(model_type, {})
    return read_config({**CONFIG, "architectures": None, "model_type": model_type, **keys, **settings})


def random_weights(*, tied=False, qkv_bias=False):
    rng = np.random.default_rng(0)
    hidden, inner, kv = 16, 24, 8
    shapes = {"model.embed_tokens.weight": (32, hidden), "model.norm.weight": (hidden,)}
    for layer in range(2):
        sizes = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
        sizes += [(inner, hidden), (inner, hidden), (hidden, inner), (hidden,), (hidden,)]
        shapes |= {f"model.layers.{layer}.{n}.weight": s for n, s in zip(GGUF_NAMES, sizes, strict=True)}
        if qkv_bias:
            shapes |= {f"model.layers.{layer}.self_attn.{n}_proj.bias": (hidden if n == "q" else kv,) for n in "qkv"}
    if not tied:
        shapes["lm_head.weight"] = (32, hidden)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def weights_of(model):
    """The weights of a model by path."""
    return {".".join(map(str, keys)): np.asarray(w[...]) for keys, w in nnx.to_flat_state(nnx.state(model))}


def write_directory(directory, weights, *, shards=1, **settings):
    (directory / "config.json").write_text(json.dumps({**CONFIG, **settings}))
    if shards == 1:
        save_file(weights, directory / "model.safetensors")
        return
    files = [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
    weight_map = {name: files[n % shards] for n, name in enumerate(weights)}
    for file in files:
        save_file({name: w for name, w in weights.items() if weight_map[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_stored(directory, tensors):
    """Weights of any type, among them fp8, which safetensors cannot write from numpy."""
    path = directory / "model.safetensors"
    path.unlink(missing_ok=True)
    for _ in write_file(path, {name: LazyArray.of(array) for name, array in tensors.items()}):
        pass


def gguf_writer(path, architecture="llama", **settings):
    """A writer with the config's metadata; `settings` replace values, or leave a key out where `None`."""
    writer = gguf.GGUFWriter(path, architecture)
    values = {
        "block_count": 2,
        "context_length": 64,
        "embedding_length": 16,
        "feed_forward_length": 24,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "rope.dimension_count": 4,
        "vocab_size": 32,
        "attention.layer_norm_rms_epsilon": 1e-5,
        **settings,
    }
    for key, value in values.items():
        if isinstance(value, str):
            writer.add_string(f"{architecture}.{key}", value)
        elif isinstance(value, list):
            writer.add_array(f"{architecture}.{key}", value)
        elif isinstance(value, bool):
            writer.add_bool(f"{architecture}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{architecture}.{key}", value)
        elif value is not None:
            writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.rope.freq_base", 1000.0)
    return writer


def write_gguf(path, weights, writer=None):
    writer = writer or gguf_writer(path)
    for name, weight in weights.items():
        writer.add_tensor(gguf_name(name), as_llama_cpp_orders(name, weight))
    finish(writer)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name):
    if not name.startswith("model.layers."):
        ends = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
        return ends[name.removesuffix(".weight")] + ".weight"
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{GGUF_NAMES[part]}.{kind}"


def as_llama_cpp_orders(name, weight):
    """Rows of Q and K as llama.cpp's converter stores them: entry i of a head beside entry i + head_dim / 2."""
    heads = 4 if ".q_proj." in name else 2 if ".k_proj." in name else None
    if heads is None:
        return weight
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
