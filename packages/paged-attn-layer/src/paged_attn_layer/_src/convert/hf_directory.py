"""Reads a Hugging Face directory, weight by weight: config.json and safetensors, in one file or in shards."""

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from paged_attn_layer._src.convert.source import reading, require_file

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
GENERATION_FILE = "generation_config.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_PREFIX = "model."
"""Starts the name of every weight but the head's. A file that was saved of the model without its head has none."""
_FLOATS = ("F64", "F32", "F16", "BF16")
"""Stored types that are read. Others (integers, float8, complex) are a model's only together with scales."""
_ROWS = 4096
"""Rows of embedding and head that are compared at once."""


class HFDirectory:
    """The weights of a directory that `save_pretrained` wrote, or that was downloaded from a hub.

    Only headers are read here; `read` opens the shard that holds the weight.

    Raises:
        ValueError: config.json or the weights are missing, or a JSON file cannot be parsed.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        self.where = str(directory)
        self.settings_file = directory / "config.json"
        self._directory = directory
        self.config: Mapping[str, Any] = _read_config(directory)
        self.shapes: dict[str, tuple[int, ...] | None] = {}
        self.problems: list[str] = []
        self._files = _weight_files(directory)
        self._stored: dict[str, str] = {}  # names in the file, of weights that have another there
        self._unreadable: set[str] = set()
        listed = dict(self._files)
        for file in sorted(set(listed.values())):
            self._add_shapes(file, listed)
        self._add_unlisted()
        self._add_prefix()
        tied = _get(self.config, "tie_word_embeddings") is True
        if tied and not self.problems and self._has_its_own_head():
            self.config = _set(self.config, "tie_word_embeddings", False)

    def read(self, name: str) -> np.ndarray:
        """One weight, in the type it is stored in."""
        path = self._directory / self._files[name]
        with reading(path), safe_open(path, framework="numpy") as shard:
            return shard.get_tensor(self._stored.get(name, name))

    def _add_shapes(self, file: str, listed: Mapping[str, str]) -> None:
        """Take the shapes from one shard's header. A shard that cannot be read is one problem, whatever it holds.

        A weight in several shards is that of the listed one.
        """
        path = self._directory / file
        if not path.is_file():
            missing = f"is missing, though {INDEX_FILE} lists weights in it"
            self._refuse(file, "is not a regular file" if path.exists() else missing)
            return
        try:
            with safe_open(path, framework="numpy") as shard:
                headers = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118
                shapes = {name: tuple(header.get_shape()) for name, header in headers.items()}
                self._check_types(file, {name: header.get_dtype() for name, header in headers.items()})
        except (SafetensorError, OSError) as error:
            self._refuse(file, f"is corrupt ({error})")
            return
        for name, shape in shapes.items():
            if name not in self.shapes or listed.get(name) == file:
                self.shapes[name], self._files[name] = shape, file

    def _refuse(self, file: str, reason: str) -> None:
        self._unreadable.add(file)
        self.problems.append(f"{file} {reason}; download it again")

    def _check_types(self, file: str, types: Mapping[str, str]) -> None:
        """Note each type in a shard that is not read."""
        for kind in dict.fromkeys(types.values()):
            if kind not in _FLOATS:
                first, *more = (name for name, other in types.items() if other == kind)
                self.problems.append(
                    f"{1 + len(more)} weights in {file} are stored as {kind}, such as {first}; "
                    f"they must be {', '.join(_FLOATS)}, so save the model in one of these"
                )

    def _add_prefix(self) -> None:
        """Name the weights of a file without `model.` as a file with it does."""
        if EMBEDDING.removeprefix(_PREFIX) not in self.shapes or any(name.startswith(_PREFIX) for name in self.shapes):
            return
        self._stored = {_PREFIX + name: name for name in self.shapes if name != HEAD}
        names = {stored: name for name, stored in self._stored.items()}
        self.shapes = {names.get(name, name): shape for name, shape in self.shapes.items()}
        self._files = {names.get(name, name): file for name, file in self._files.items()}

    def _has_its_own_head(self) -> bool:
        """True if the head's weight is in the files and is not the embedding, whatever the config says."""
        if not self.shapes.get(HEAD) or not self.shapes.get(EMBEDDING):
            return False
        if self.shapes[HEAD] != self.shapes[EMBEDDING]:
            return True
        return any(not np.array_equal(*pair) for pair in zip(self._rows(HEAD), self._rows(EMBEDDING), strict=True))

    def _rows(self, name: str) -> Iterator[np.ndarray]:
        """The rows of a matrix, some at a time."""
        path = self._directory / self._files[name]
        with reading(path), safe_open(path, framework="numpy") as shard:
            weight = shard.get_slice(self._stored.get(name, name))
            count = weight.get_shape()[0]
            for start in range(0, count, _ROWS):
                yield weight[start : min(start + _ROWS, count)]

    def _add_unlisted(self) -> None:
        """Note the weights that the index lists and no readable shard holds."""
        for name, file in self._files.items():
            if name not in self.shapes and name:
                self.shapes[name] = None
                if file not in self._unreadable:
                    self.problems.append(f"{name} is not in {file}, though {INDEX_FILE} says so; download both again")


def _read_config(directory: pathlib.Path) -> Mapping[str, Any]:
    """The config.json. Its `eos_token_id` lists the end tokens of generation_config.json too."""
    config = _read_json(directory / "config.json")
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
