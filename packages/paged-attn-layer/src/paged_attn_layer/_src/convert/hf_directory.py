"""Reads a Hugging Face directory, weight by weight: config.json and safetensors, in one file or in shards."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError

from paged_attn_layer._src.convert.lazy import LazyArray, full_index
from paged_attn_layer._src.convert.quantised import read_quantisation
from paged_attn_layer._src.convert.safetensors_file import StoredTensor, read_header
from paged_attn_layer._src.convert.source import reading, require_file

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
GENERATION_FILE = "generation_config.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_QUANTISATION = "quantization_config"
_PREFIX = "model."
"""Starts the name of every weight but the head's. A file that was saved of the model without its head has none."""
_FLOATS = ("F64", "F32", "F16", "BF16")
"""Stored types of plain weights. Others (integers, float8, complex) are a model's only together with scales."""
_ROWS = 4096
"""Rows of embedding and head that are compared at once."""


class HFDirectory:
    """The weights of a directory that `save_pretrained` wrote, or that was downloaded from a hub.

    Only headers are read here. A part of a weight is read from the shard that holds it. Weights in fp8 or mxfp4 are
    made plain when they are read.

    Raises:
        ValueError: config.json or the weights are missing, or a JSON file cannot be parsed.
        NotImplementedError: the weights are quantised in another way.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        self.where = str(directory)
        self.settings_from = str(directory / CONFIG_FILE)
        self._directory = directory
        self.config: Mapping[str, Any] = _read_config(directory)
        self.problems: list[str] = []
        self._weights = _with_prefix(self._read_weights(_weight_files(directory)))
        self.shapes = {name: weight and weight.shape for name, weight in self._weights.items()}
        tied = _get(self.config, "tie_word_embeddings") is True
        if tied and not self.problems and self._has_its_own_head():
            self.config = _set(self.config, "tie_word_embeddings", False)

    def weight(self, name: str) -> LazyArray:
        """One weight, in the type it is stored in, or float32 if it is quantised."""
        weight = self._weights[name]
        if weight is None:
            raise ValueError(f"{name} of {self.where} cannot be read; `problems` says why")
        return weight

    def _read_weights(self, listed: Mapping[str, str]) -> dict[str, LazyArray | None]:
        """All weights of the shards' headers. One that cannot be read is `None`, and is a problem."""
        with reading(self.settings_from):
            quantisation = read_quantisation(_get(self.config, _QUANTISATION) or self.config.get(_QUANTISATION))
        kinds = (*_FLOATS, *(quantisation.kinds if quantisation else ()))
        weights = self._read_shards(listed, kinds)
        if quantisation:
            weights, problems = quantisation.dequantise(weights)
            self.problems += problems
            self.config = _set(self.config, _QUANTISATION, None) | {_QUANTISATION: None}
        return weights

    def _read_shards(self, listed: Mapping[str, str], kinds: tuple[str, ...]) -> dict[str, LazyArray | None]:
        """What the shards hold. A weight in several shards is that of the listed one."""
        weights: dict[str, LazyArray | None] = {}
        unreadable = set()
        for file in sorted(set(listed.values())):
            tensors = self._read_shard(file)
            if tensors is None:
                unreadable.add(file)
                continue
            self._check_kinds(file, tensors, kinds)
            for name, tensor in tensors.items():
                if name not in weights or listed.get(name) == file:
                    weights[name] = tensor.lazy() if tensor.kind in kinds else None
        for name, file in listed.items():
            if name and name not in weights:
                weights[name] = None
                if file not in unreadable:
                    self.problems.append(f"{name} is not in {file}, though {INDEX_FILE} says so; download both again")
        return weights

    def _read_shard(self, file: str) -> Mapping[str, StoredTensor] | None:
        """The tensors of one shard. `None`, and one problem, if it cannot be read, whatever it holds."""
        path = self._directory / file
        if not path.is_file():
            missing = f"is missing, though {INDEX_FILE} lists weights in it"
            self.problems.append(f"{file} {'is not a regular file' if path.exists() else missing}; download it again")
            return None
        try:
            return read_header(path)
        except (SafetensorError, OSError) as error:
            self.problems.append(f"{file} is corrupt ({error}); download it again")
            return None

    def _check_kinds(self, file: str, tensors: Mapping[str, StoredTensor], kinds: tuple[str, ...]) -> None:
        """Note each type in a shard that is not read."""
        for kind in dict.fromkeys(tensor.kind for tensor in tensors.values()):
            if kind not in kinds:
                first, *more = (name for name, tensor in tensors.items() if tensor.kind == kind)
                self.problems.append(
                    f"{1 + len(more)} weights in {file} are stored as {kind}, such as {first}; "
                    f"they must be {', '.join(kinds)}, so save the model in one of these"
                )

    def _has_its_own_head(self) -> bool:
        """True if the head's weight is in the files and is not the embedding, whatever the config says."""
        head, embedding = self._weights.get(HEAD), self._weights.get(EMBEDDING)
        if head is None or embedding is None:
            return False
        if head.shape != embedding.shape:
            return True
        rows, *rest = head.shape
        for start in range(0, rows, _ROWS):
            part = (slice(start, min(start + _ROWS, rows)), *full_index(tuple(rest)))
            if not np.array_equal(head.read(part), embedding.read(part)):
                return True
        return False


def _with_prefix(weights: dict[str, LazyArray | None]) -> dict[str, LazyArray | None]:
    """The weights of a file without `model.` under the names that a file with it has."""
    if EMBEDDING.removeprefix(_PREFIX) not in weights or any(name.startswith(_PREFIX) for name in weights):
        return weights
    return {name if name == HEAD else _PREFIX + name: weight for name, weight in weights.items()}


def _read_config(directory: pathlib.Path) -> Mapping[str, Any]:
    """The config.json. Its `eos_token_id` lists the end tokens of generation_config.json too."""
    config = _read_json(directory / CONFIG_FILE)
    generation = directory / GENERATION_FILE
    levels = [config, _nested(config), _read_json(generation) if generation.exists() else {}]
    return _set(config, "eos_token_id", [end for level in levels for end in _as_list(level.get("eos_token_id"))])


def _nested(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The keys of the language model, where they lie beside those of, say, images."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else {}


def _get(config: Mapping[str, Any], key: str) -> Any:
    return (_nested(config) or config).get(key)


def _set(config: Mapping[str, Any], key: str, value: Any) -> Mapping[str, Any]:
    nested = _nested(config)
    return {**config, "text_config": {**nested, key: value}} if nested else {**config, key: value}


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _weight_files(directory: pathlib.Path) -> dict[str, str]:
    """The file of each weight. A single file has the name "" until its header is read."""
    if (directory / INDEX_FILE).exists():
        index = _read_json(directory / INDEX_FILE)
        if not isinstance(index.get("weight_map"), dict):
            raise ValueError(f"{directory / INDEX_FILE} has no weight_map; download it again")
        for name, file in index["weight_map"].items():
            if not _is_bare_name(file):
                raise ValueError(
                    f"{directory / INDEX_FILE} says that {name} is in {file!r}, "
                    "which must be the name of a file beside it; download it again"
                )
        return dict(index["weight_map"])
    if (directory / SINGLE_FILE).exists():
        return {"": SINGLE_FILE}
    raise ValueError(
        f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}; weights in another format (pytorch_model.bin) "
        "must first be saved with save_pretrained(..., safe_serialization=True)"
    )


def _is_bare_name(file: Any) -> bool:
    """True for the name of a file, without a directory or a drive, on any system."""
    return isinstance(file, str) and file not in ("", "..") and pathlib.PureWindowsPath(file).name == file


def _read_json(path: pathlib.Path) -> Mapping[str, Any]:
    require_file(path, "a Hugging Face model directory has one")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, and holds a {type(content).__name__}; download it again")
    return content
