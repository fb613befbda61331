"""Reads a Hugging Face directory, weight by weight: config.json and safetensors, in one file or in shards."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from safetensors import SafetensorError

from paged_attn_layer._src.convert.hf_weights import HFWeights, get_setting, set_setting, text_settings
from paged_attn_layer._src.convert.lazy import LazyArray
from paged_attn_layer._src.convert.quantised import read_quantisation
from paged_attn_layer._src.convert.safetensors_file import StoredTensor, read_header
from paged_attn_layer._src.convert.source import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, reading, require_file
from paged_attn_layer._src.models.read_decoder import read_end_token_ids
from paged_cache import HFConfig

GENERATION_FILE = "generation_config.json"
_QUANTISATION = "quantization_config"
_LONGEST_NAME = 255
"""Bytes of the longest file name that common systems allow."""
_FLOATS = ("F64", "F32", "F16", "BF16")
"""Stored types of plain weights. Others (integers, float8, complex) are a model's only together with scales."""


class HFDirectory(HFWeights):
    """The weights of a directory that `save_pretrained` wrote, or that was downloaded from a hub.

    Only headers are read here. A part of a weight is read from the shard that holds it. Weights in fp8 or mxfp4 are
    made plain when they are read.

    Raises:
        ValueError: config.json or the weights are missing, or a JSON file cannot be parsed.
        NotImplementedError: the weights are quantised in another way.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        settings_from = directory / CONFIG_FILE
        config = read_config_file(directory)
        with reading(settings_from):
            quantisation = read_quantisation(get_setting(config, _QUANTISATION) or config.get(_QUANTISATION))
        kinds = (*_FLOATS, *(quantisation.kinds if quantisation else ()))
        weights, problems = _read_shards(directory, kinds)
        if quantisation:
            with reading(directory):
                weights, more = quantisation.dequantise(weights)
            problems += more
            config = {**set_setting(config, _QUANTISATION, None), _QUANTISATION: None}
        super().__init__(str(directory), str(settings_from), config, weights, problems)


def _read_shards(directory: pathlib.Path, kinds: Sequence[str]) -> tuple[dict[str, LazyArray | None], list[str]]:
    """What the shards hold, and what is wrong with them. A weight in several shards is that of the listed one.

    A weight that cannot be read is `None`, and its reason is among the problems.
    """
    listed = _weight_files(directory)
    weights: dict[str, LazyArray | None] = {}
    problems: list[str] = []
    unreadable = set()
    for file in sorted(set(listed.values())):
        try:
            tensors = _read_shard(directory / file)
        except ValueError as error:
            unreadable.add(file)
            problems.append(f"{file} {error}; download it again")
            continue
        problems += _wrong_kinds(file, tensors, kinds)
        for name, tensor in tensors.items():
            if name not in weights or listed.get(name) == file:
                weights[name] = tensor.lazy() if tensor.kind in kinds else None
    unlisted = {name: file for name, file in listed.items() if name and name not in weights}
    problems += [
        f"{name} is not in {file}, though {INDEX_FILE} says so; download both again"
        for name, file in unlisted.items()
        if file not in unreadable
    ]
    return weights | dict.fromkeys(unlisted), problems


def _read_shard(path: pathlib.Path) -> Mapping[str, StoredTensor]:
    """The tensors of one shard. An error goes on where the file's name ends."""
    if not path.is_file():
        missing = f"is missing, though {INDEX_FILE} lists weights in it"
        raise ValueError("is not a regular file" if path.exists() else missing)
    try:
        return read_header(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"is corrupt ({error})") from error


def _wrong_kinds(file: str, tensors: Mapping[str, StoredTensor], kinds: Sequence[str]) -> list[str]:
    """A line for each type in a shard that is not read."""
    problems = []
    for kind in dict.fromkeys(tensor.kind for tensor in tensors.values()):
        if kind not in kinds:
            first, *more = (name for name, tensor in tensors.items() if tensor.kind == kind)
            problems.append(
                f"{1 + len(more)} weights in {file} are stored as {kind}, such as {first}; "
                f"they must be {', '.join(kinds)}, so save the model in one of these"
            )
    return problems


def read_config_file(directory: pathlib.Path) -> Mapping[str, Any]:
    """The config.json of a directory. Its `eos_token_id` lists the end tokens of generation_config.json too."""
    config = read_json(directory / CONFIG_FILE)
    generation = directory / GENERATION_FILE
    levels = [config, text_settings(config), read_json(generation) if generation.exists() else {}]
    with reading(generation):
        read_end_token_ids(HFConfig(levels[-1]))  # an error names the file that it is in
    return set_setting(config, "eos_token_id", [end for level in levels for end in _as_list(level.get("eos_token_id"))])


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _weight_files(directory: pathlib.Path) -> dict[str, str]:
    """The file of each weight. A single file has the name "" until its header is read."""
    if (directory / INDEX_FILE).exists():
        index = read_json(directory / INDEX_FILE)
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
    if not isinstance(file, str) or file in ("", "..") or pathlib.PureWindowsPath(file).name != file:
        return False
    return "\0" not in file and len(file.encode(errors="surrogatepass")) <= _LONGEST_NAME


def read_json(path: pathlib.Path, advice: str = "a Hugging Face model directory has one") -> Mapping[str, Any]:
    """The object in a JSON file; `advice` says what to do if there is no file.

    Raises:
        ValueError: the file is missing, or is no JSON, or holds no object.
    """
    require_file(path, advice)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, and holds a {type(content).__name__}; download it again")
    return content
