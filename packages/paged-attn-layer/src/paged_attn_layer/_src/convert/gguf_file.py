"""A GGUF file (llama.cpp's format) seen as a Hugging Face checkpoint: names, order of rows, config.

Facts from the GGUF specification (ggml-org/ggml, docs/gguf.md) and from llama.cpp's convert_hf_to_gguf.py.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}

_SETTINGS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
"""What the keys `<architecture>.*` are called in a config.json. A key in neither this nor `_CHECKED` is refused."""
_CHECKED = {
    "attention.value_length",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "expert_count",
}

_NAMES = (
    (r"token_embd\.weight", r"model.embed_tokens.weight"),
    (r"output_norm\.weight", r"model.norm.weight"),
    (r"output\.weight", r"lm_head.weight"),
    (r"blk\.(\d+)\.attn_norm\.weight", r"model.layers.\1.input_layernorm.weight"),
    (r"blk\.(\d+)\.attn_([qkv])\.(weight|bias)", r"model.layers.\1.self_attn.\2_proj.\3"),
    (r"blk\.(\d+)\.attn_output\.(weight|bias)", r"model.layers.\1.self_attn.o_proj.\2"),
    (r"blk\.(\d+)\.ffn_norm\.weight", r"model.layers.\1.post_attention_layernorm.weight"),
    (r"blk\.(\d+)\.ffn_(gate|up|down)\.(weight|bias)", r"model.layers.\1.mlp.\2_proj.\3"),
)
"""GGUF tensor names and the Hugging Face names of the same weights; a tensor of another name keeps its own."""


class GGUFFile:
    """The weights of a GGUF file, dequantised one at a time.

    Raises:
        ValueError: the file is missing, cut short or no GGUF file, or has tensors stored in a type that cannot be read.
        NotImplementedError: its architecture or a setting is not supported; names it.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.where = str(path)
        reader = open_gguf(path)
        self._architecture = read_field(reader, "general.architecture")
        self._tensors = {_hf_name(tensor.name): tensor for tensor in reader.tensors}
        self.config: Mapping[str, Any] = _hf_config(reader, self._architecture, set(self._tensors))
        self.shapes = {name: tuple(int(n) for n in reversed(t.shape)) for name, t in self._tensors.items()}
        self.problems = _unreadable(self._tensors)

    def read(self, name: str) -> np.ndarray:
        """One weight in float32, its rows in Hugging Face's order."""
        tensor = self._tensors[name]
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(self.shapes[name])
        if self._architecture == "llama" and ".q_proj." in name:
            return _halves_apart(weight, self.config["num_attention_heads"])
        if self._architecture == "llama" and ".k_proj." in name:
            return _halves_apart(weight, self.config.get("num_key_value_heads") or self.config["num_attention_heads"])
        return weight


def open_gguf(path: pathlib.Path) -> gguf.GGUFReader:
    """A reader of the file, which it maps into memory.

    Raises:
        ValueError: there is no such file, or it is cut short or no GGUF file.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; give the path of a .gguf file")
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable GGUF file ({error}); download it again") from error


def read_field(reader: gguf.GGUFReader, key: str) -> Any:
    """The value of a metadata key, `None` where the file does not have it."""
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _hf_name(name: str) -> str:
    for pattern, replacement in _NAMES:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    return name


def _hf_config(reader: gguf.GGUFReader, architecture: str, names: set[str]) -> Mapping[str, Any]:
    if architecture not in _ARCHITECTURES:
        raise NotImplementedError(
            f"GGUF architecture {architecture!r} is not supported; supported are {', '.join(_ARCHITECTURES)}"
        )
    prefix = f"{architecture}."
    found = {key.removeprefix(prefix): read_field(reader, key) for key in reader.fields if key.startswith(prefix)}
    unknown = sorted(set(found) - set(_SETTINGS) - _CHECKED)
    if unknown:
        raise NotImplementedError(f"GGUF settings of {architecture} that are not supported: {', '.join(unknown)}")
    config = {_SETTINGS[key]: value for key, value in found.items() if key in _SETTINGS}
    _check_settings(found, config)
    config["architectures"] = [_ARCHITECTURES[architecture]]
    config.setdefault("vocab_size", len(read_field(reader, "tokenizer.ggml.tokens") or ()) or None)
    config["tie_word_embeddings"] = "lm_head.weight" not in names
    config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in names
    config["mlp_bias"] = "model.layers.0.mlp.up_proj.bias" in names
    if "rope.scaling.type" in found:
        config["rope_scaling"] = {"type": found["rope.scaling.type"], "factor": found.get("rope.scaling.factor", 1.0)}
        if found["rope.scaling.type"] == "none":
            config["rope_scaling"] = None
    return config


def _check_settings(found: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    per_layer = sorted(key for key, value in found.items() if isinstance(value, list))
    if per_layer:
        raise NotImplementedError(f"GGUF settings that differ by layer are not supported: {', '.join(per_layer)}")
    if found.get("expert_count"):
        raise NotImplementedError(f"expert_count={found['expert_count']} is not supported: the model is a mixture")
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    head_dim = config.get("head_dim") or (hidden // heads if heads and hidden else None)
    for key in ("attention.value_length", "rope.dimension_count"):
        if head_dim is not None and found.get(key, head_dim) != head_dim:
            raise NotImplementedError(f"{key}={found[key]} is not supported; it must be the head size, {head_dim}")


def _unreadable(tensors: Mapping[str, gguf.ReaderTensor]) -> list[str]:
    """The tensors stored in a type that `gguf` cannot dequantise, tried on one row of each type."""
    by_type: dict[gguf.GGMLQuantizationType, list[str]] = {}
    for name, tensor in tensors.items():
        by_type.setdefault(tensor.tensor_type, []).append(name)
    problems = []
    for kind, names in by_type.items():
        try:
            gguf.dequantize(tensors[names[0]].data[:1], kind)
        except NotImplementedError:
            problems.append(f"{len(names)} weights are stored as {kind.name}, such as {names[0]}; requantise the file")
    return problems


def _halves_apart(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of Q or K as Hugging Face orders them. In llama.cpp's files a head's two halves are interleaved."""
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return np.swapaxes(pairs, 1, 2).reshape(weight.shape)
