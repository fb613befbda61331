"""A GGUF file (llama.cpp's format) read as a Hugging Face checkpoint. What differs by family is in `GGUFNames`.

Facts from the GGUF specification (ggml-org/ggml, docs/gguf.md) and from llama.cpp's convert_hf_to_gguf.py.
"""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import gguf
import numpy as np

from paged_attn_layer._src.convert.gguf_end_tokens import end_token_ids
from paged_attn_layer._src.convert.gguf_header import GGUFHeader, StoredTensor
from paged_attn_layer._src.convert.gguf_names import GGUFNames
from paged_attn_layer._src.convert.lazy import LazyArray
from paged_attn_layer._src.convert.operations import Reshape
from paged_attn_layer._src.convert.source import reading, require_file
from paged_attn_layer._src.convert.weights import WeightMatch, WeightRule
from paged_attn_layer._src.models.registry import find_gguf_family

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
"""Metadata keys that mean the same in every family, without `<architecture>.`, and their keys in a config.json."""
_CHECKED = (
    "attention.value_length",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scale_linear",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
)
"""Metadata keys that are read or checked in other ways, or change nothing in the supported types of scaling."""
_ONLY = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True, "rope.scaling.attn_factor": 1.0}
"""Metadata keys of which one value is supported: that of a model without what the key is for.

A key that is in none of these, nor the family's, is refused."""
_OUTPUT = "output.weight"
"""The tensor of the head. A file without it has a model whose head is the embedding."""


_TRAINED = "original_max_position_embeddings"
"""The key in a config.json of the length that a model was trained for before its positions were scaled."""
_FREQ_FACTORS = "rope_freqs.weight"
"""Divisors of the rotary frequencies, one for each pair: how files of Llama 3.1 and later state their scaling."""


class GGUFFile:
    """The weights of a GGUF file, dequantised when they are read.

    Raises:
        ValueError: the file is missing, cut short, no GGUF file, or lacks a setting.
        NotImplementedError: its architecture or a setting is not supported; names it.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.where = self.settings_from = str(path)
        self._file = open_gguf(path)
        with reading(path):
            self._read_header(self._file)

    def _read_header(self, reader: GGUFHeader) -> None:
        family, names = find_gguf_family(read_field(reader, "general.architecture"))
        tensors = dict(reader.tensors)
        config = _hf_config(reader, names, set(tensors))
        if tensors.pop(_FREQ_FACTORS, None):
            config["rope_freq_factors"] = _dequantised(reader, _FREQ_FACTORS).read().ravel().tolist()
        self.config: Mapping[str, Any] = {**config, "architectures": [family.architectures[0]]}
        self._weights = _hf_weights(names.tensors(config), tensors)
        self.shapes = {name: match.sources[index][1] for name, (match, index) in self._weights.items()}
        self.problems = _unreadable(reader, tensors)

    def weight(self, name: str) -> LazyArray:
        """One weight in float32, as Hugging Face has it. Rows are dequantised when they are read."""
        match, index = self._weights[name]
        return match.backward([_dequantised(self._file, tensor) for tensor in match.targets])[index]


def open_gguf(path: pathlib.Path) -> GGUFHeader:
    """Opens a GGUF file, mapped into memory.

    Raises:
        ValueError: there is no such file, or it is cut short, no GGUF file, or its tensor table is wrong.
    """
    require_file(path, "give the path of a .gguf file")
    try:
        return GGUFHeader(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not a readable GGUF file ({error}); download it again") from error


def read_field(reader: GGUFHeader, key: str) -> Any:
    """The value of a metadata key; `None` if the file does not have it."""
    return reader.fields.get(key)


def _hf_weights(rules: Sequence[WeightRule], tensors: Mapping[str, StoredTensor]) -> dict[str, tuple[WeightMatch, int]]:
    """For each Hugging Face weight its match, and its place among the match's sources.

    The matches are those of the reversed rules, from Hugging Face weights to the tensors that the file has. A tensor
    that no rule names keeps its own name.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    matches = [match for rule in rules for match in rule.reverse().matches(shapes)]
    named = {tensor for match in matches for tensor in match.targets}
    matches += [WeightMatch(((name, shape),), (name,), ()) for name, shape in shapes.items() if name not in named]
    return {name: (match, index) for match in matches for index, (name, _) in enumerate(match.sources)}


def _hf_config(reader: GGUFHeader, names: GGUFNames, tensors: set[str]) -> dict[str, Any]:
    prefix = f"{names.architecture}."
    found = {key.removeprefix(prefix): read_field(reader, key) for key in reader.fields if key.startswith(prefix)}
    settings = {**_SETTINGS, **dict(names.settings)}
    unknown = sorted(set(found) - set(settings) - set(_CHECKED) - set(_ONLY))
    if unknown:
        raise NotImplementedError(f"GGUF settings of {names.architecture} that are not supported: {', '.join(unknown)}")
    config = {settings[key]: value for key, value in found.items() if key in settings}
    _check_settings(found, config)
    config.setdefault("vocab_size", len(read_field(reader, "tokenizer.ggml.tokens") or ()) or None)
    config["tie_word_embeddings"] = _OUTPUT not in tensors
    config["eos_token_id"] = end_token_ids(reader.fields)
    config |= {key: tensor in tensors for tensor, key in names.switches}
    if scaling := _rope_scaling(found):
        config["rope_scaling"] = scaling
    return {**config, **(names.implied(config) if names.implied else {})}


def _rope_scaling(found: Mapping[str, Any]) -> dict[str, Any]:
    """The scaling of positions; without a type it is linear. `rope.scale_linear` is the older name of the factor."""
    factor = found.get("rope.scaling.factor", found.get("rope.scale_linear")) or 1.0
    kind = found.get("rope.scaling.type", "linear")
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return {}
    trained = found.get("rope.scaling.original_context_length")
    return {"type": kind, "factor": factor} | ({} if trained is None else {_TRAINED: trained})


def _check_settings(found: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    per_layer = sorted(key for key, value in found.items() if isinstance(value, list))
    if per_layer:
        raise NotImplementedError(f"GGUF settings that differ by layer are not supported: {', '.join(per_layer)}")
    for key, only in _ONLY.items():
        if found.get(key, only) != only:
            raise NotImplementedError(f"{key}={found[key]} is not supported; it must be {only}")
    if "rms_norm_eps" not in config:
        raise ValueError("the GGUF file has no attention.layer_norm_rms_epsilon; download it again")
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if not heads or not hidden:
        raise ValueError("the GGUF file has no attention.head_count or embedding_length above 0; download it again")
    head_dim = config.get("head_dim") or hidden // heads
    for key in ("attention.value_length", "rope.dimension_count"):
        if found.get(key, head_dim) != head_dim:
            raise NotImplementedError(f"{key}={found[key]} is not supported; it must be the head size, {head_dim}")


def _unreadable(reader: GGUFHeader, tensors: Mapping[str, StoredTensor]) -> list[str]:
    """A line for each stored type that `gguf` cannot dequantise. One row of each type is tried."""
    by_type: dict[gguf.GGMLQuantizationType, list[StoredTensor]] = {}
    for tensor in tensors.values():
        by_type.setdefault(tensor.kind, []).append(tensor)
    problems = []
    for kind, (first, *more) in by_type.items():
        try:
            gguf.dequantize(reader.rows(first, 0, 1), kind)
        except NotImplementedError:
            count = 1 + len(more)
            problems.append(f"{count} weights are stored as {kind.name}, such as {first.name}; requantise the file")
    return problems


def _dequantised(reader: GGUFHeader, name: str) -> LazyArray:
    """A tensor in float32."""
    tensor = reader.tensors[name]
    shape = tensor.shape if len(tensor.shape) > 1 else (1, *tensor.shape)
    per_row = math.prod(shape[1:-1])  # rows along the last axis, of each entry of the first

    def rows(start: int, stop: int) -> np.ndarray:
        with reading(reader.path):
            stored = reader.rows(tensor, start * per_row, stop * per_row)
            return gguf.dequantize(stored, tensor.kind).reshape(stop - start, *shape[1:])

    whole = LazyArray.of_rows(shape, np.float32, rows)
    return whole if shape == tensor.shape else Reshape(shape, tensor.shape).apply([whole])[0]
