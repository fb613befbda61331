"""Writes models and converted checkpoints: Hugging Face directories, and orbax checkpoints."""

import contextlib
import dataclasses
import importlib
import json
import math
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from paged_attn_layer._src.convert.extras import needs_extra
from paged_attn_layer._src.convert.hf_weights import text_settings
from paged_attn_layer._src.convert.lazy import LazyArray
from paged_attn_layer._src.convert.load import (
    ModelSource,
    abstract_model,
    check_dtype,
    match_checkpoint,
    open_checkpoint,
    variables_by_path,
)
from paged_attn_layer._src.convert.memory_source import WeightFunction, lazy_array
from paged_attn_layer._src.convert.place import place
from paged_attn_layer._src.convert.progress import HostMemory, byte_progress
from paged_attn_layer._src.convert.source import CONFIG_FILE, INDEX_FILE, SINGLE_FILE
from paged_attn_layer._src.convert.tokenizer import load_tokenizer
from paged_attn_layer._src.convert.weights import export_weights
from paged_attn_layer._src.models.causal_lm import CausalLM
from paged_attn_layer._src.models.family import Family
from paged_attn_layer._src.models.registry import find_family
from paged_cache import HFConfig

Format = Literal["safetensors", "orbax"]
FORMATS: tuple[Format, ...] = ("safetensors", "orbax")

MAX_FILE_BYTES = 5_000_000_000
"""The most bytes of weights in one safetensors file, as in Hugging Face's own directories."""
_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files beside the weights that are copied."""


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """What `convert_checkpoint` did."""

    num_weights: int
    num_bytes: int
    """Bytes of the weights as they are written."""
    seconds: float
    host_memory: int | None
    """Bytes by which the memory of this process rose at most; `None` if the system does not say."""
    notes: tuple[str, ...]
    """What is not in the new directory, and why."""


def convert_checkpoint(
    source: ModelSource,
    directory: str | os.PathLike[str],
    *,
    config: Mapping[str, Any] | None = None,
    to: Format = "safetensors",
    dtype: DTypeLike | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    progress: bool = False,
) -> ConversionReport:
    """Writes the weights of any source of `load_model` to a new directory, which `load_model` reads too.

    Everything is checked before the first weight is read. The directory is there when all is written, and not before.
    With `to="safetensors"` the host holds one weight at a time. With `to="orbax"` the default device holds all of them
    while they are written: orbax writes whole models.

    Args:
        source: as in `load_model`.
        directory: the new directory. It must not exist, or be empty.
        config: with arrays, the content of the model's `config.json`; with a path, it must be left out.
        to: `"safetensors"`, a Hugging Face directory; or `"orbax"`, an orbax checkpoint beside a `config.json`.
        dtype: type of the written weights; `None` keeps the type of each, and makes quantised ones float32.
        max_file_bytes: the most bytes of weights in one safetensors file; a larger weight gets a file of its own.
        progress: show a bar with bytes and rate on standard error (needs tqdm).

    Raises:
        ValueError: as in `load_model`, or the directory exists, or an argument cannot be used.
        NotImplementedError: as in `load_model`, or the config cannot be written for transformers.
        OSError: the directory cannot be written, or the disk has too little room.
        ModuleNotFoundError: safetensors, gguf or orbax is not installed; says what to install.
    """
    _check_arguments(to, dtype, max_file_bytes)
    started, memory = time.perf_counter(), HostMemory()
    with _new_directory(pathlib.Path(directory)) as new:
        matched = match_checkpoint(open_checkpoint(source, config), dtype or jnp.float32)
        _write_config(new, matched.source.config, matched.family, to, dtype)
        weights = dict(matched.weights() if to == "orbax" else matched.stored())
        num_bytes = sum(_num_bytes(weight, dtype) for weight in weights.values())
        with byte_progress("converting", num_bytes, show=progress) as advance:
            if to == "orbax":
                _write_orbax(new, _placed(weights, dtype, advance))
            else:
                _write_safetensors(new, weights, dtype, max_file_bytes, advance)
        notes = _copy_tokenizer(source, new)
    return ConversionReport(len(weights), num_bytes, time.perf_counter() - started, memory.rise(), notes)


def save_model(
    model: CausalLM,
    directory: str | os.PathLike[str],
    *,
    config: Mapping[str, Any],
    to: Format = "safetensors",
    dtype: DTypeLike | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    progress: bool = False,
) -> None:
    """Writes a model to a new directory, which `load_model` reads: the inverse of loading, bit for bit.

    With `to="safetensors"` transformers reads it too. The directory is there when all is written, and not before.

    Args:
        model: the model, on any devices of this process.
        directory: the new directory. It must not exist, or be empty.
        config: the content of the model's `config.json`.
        to: `"safetensors"`, a Hugging Face directory; or `"orbax"`, an orbax checkpoint beside a `config.json`.
        dtype: type of the written weights; `None` keeps the type of each.
        max_file_bytes: the most bytes of weights in one safetensors file; a larger weight gets a file of its own.
        progress: show a bar with bytes and rate on standard error (needs tqdm).

    Raises:
        ValueError: the model is not what the config says, the directory exists, or an argument cannot be used.
        NotImplementedError: the config's family is not supported.
        OSError: the directory cannot be written, or the disk has too little room.
        ModuleNotFoundError: safetensors or orbax is not installed; says what to install.
    """
    _check_arguments(to, dtype, max_file_bytes)
    settings = HFConfig.of(config)
    family = find_family(settings)
    family_config = family.read_config(settings)
    arrays = _checked_arrays(model, family, family_config)
    with _new_directory(pathlib.Path(directory)) as new:
        _write_config(new, config, family, to, dtype)
        if to == "orbax":
            _write_orbax(new, {path: array.astype(dtype or array.dtype) for path, array in arrays.items()})
            return
        lazy = {path: lazy_array(array) for path, array in arrays.items()}
        weights = dict(export_weights(lazy, family.weights(family_config)))
        total = sum(_num_bytes(weight, dtype) for weight in weights.values())
        with byte_progress("saving", total, show=progress) as advance:
            _write_safetensors(new, weights, dtype, max_file_bytes, advance)


def _check_arguments(to: str, dtype: DTypeLike | None, max_file_bytes: int) -> None:
    if to not in FORMATS:
        raise ValueError(f"to={to!r} must be one of {', '.join(FORMATS)}")
    if dtype is not None:
        check_dtype(dtype)
    if max_file_bytes < 1:
        raise ValueError(f"max_file_bytes={max_file_bytes} must be at least 1")
    with needs_extra("orbax" if to == "orbax" else "hf"):
        importlib.import_module("orbax.checkpoint" if to == "orbax" else "safetensors")


def _checked_arrays(model: CausalLM, family: Family, config: Any) -> dict[str, jax.Array]:
    """The model's weights by path, if they are those of a model with this config."""
    variables = variables_by_path(nnx.split(cast(nnx.Module, model))[1])
    arrays = {path: variable[...] for path, variable in variables.items()}
    wanted = variables_by_path(nnx.split(abstract_model(family, config, jnp.float32))[1])
    problems = [f"the model has no {path}, which config asks for" for path in wanted if path not in arrays]
    problems += [f"{path} of the model has no place in a model of config" for path in arrays if path not in wanted]
    problems += [
        f"{path} of the model has shape {array.shape}, and of config {wanted[path].shape}"
        for path, array in arrays.items()
        if path in wanted and array.shape != wanted[path].shape
    ]
    if problems:
        raise ValueError("config is not that of the model; nothing was written:\n  - " + "\n  - ".join(problems))
    return arrays


@contextlib.contextmanager
def _new_directory(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A hidden directory beside `path`. It becomes `path` when all went well, and is removed otherwise."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists already; give the path of a new directory")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path} cannot be made: {path.absolute().parent} is not a directory")
    new = path.absolute().parent / f".{path.name}.{os.getpid()}.partial"
    new.mkdir()
    try:
        yield new
        if path.exists():
            path.rmdir()
        new.rename(path)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _write_config(
    directory: pathlib.Path, config: Mapping[str, Any], family: Family, to: Format, dtype: DTypeLike | None
) -> None:
    """Writes the config.json of plain weights. It names the family, for transformers finds a model by that alone."""
    if to == "safetensors" and config.get("rope_freq_factors"):
        raise NotImplementedError(
            "the GGUF file lists divisors of the rotary frequencies (rope_freqs.weight), for which transformers' "
            'config.json has no key; use to="orbax"'
        )
    plain = _plain_config(config)
    architecture = HFConfig.of(plain).architecture or family.architectures[0]
    written = {"architectures": [architecture], "model_type": family.model_types[0], **plain}
    if dtype is not None:
        written["dtype"] = jnp.dtype(dtype).name
        written.pop("torch_dtype", None)
    (directory / CONFIG_FILE).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def _plain_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of plain weights. Of a model with pictures it is that of the language model, all that is written.

    A key that is `null` stays, for to transformers a key that is left out means something else.
    """
    if text := text_settings(config):
        tied = HFConfig.of(config).flag("tie_word_embeddings", False)
        config = {"eos_token_id": config.get("eos_token_id"), **text, "tie_word_embeddings": tied}
    ends = {"eos_token_id": config.get("eos_token_id") or None}
    return {key: value for key, value in {**config, **ends}.items() if key != "quantization_config"}


def _num_bytes(weight: LazyArray, dtype: DTypeLike | None) -> int:
    return math.prod(weight.shape) * jnp.dtype(dtype or weight.dtype).itemsize


def _placed(
    weights: Mapping[str, LazyArray], dtype: DTypeLike | None, advance: Callable[[int], object]
) -> dict[str, jax.Array]:
    """The weights on the default device."""
    arrays = {}
    for path, weight in weights.items():
        arrays[path] = place(weight, dtype or weight.dtype)
        advance(arrays[path].nbytes)
    return arrays


def _write_orbax(directory: pathlib.Path, arrays: Mapping[str, jax.Array]) -> None:
    from paged_attn_layer._src.convert.orbax_directory import write_orbax  # noqa: PLC0415

    write_orbax(directory, arrays)


def _write_safetensors(
    directory: pathlib.Path,
    weights: Mapping[str, LazyArray],
    dtype: DTypeLike | None,
    max_file_bytes: int,
    advance: Callable[[int], object],
) -> None:
    """Writes weights under Hugging Face's names: one file, or several and their index."""
    from paged_attn_layer._src.convert.safetensors_file import write_file  # noqa: PLC0415

    total = sum(_num_bytes(weight, dtype) for weight in weights.values())
    _check_room(directory, total)
    parts = _into_parts(weights, dtype, max_file_bytes)
    files = [f"model-{number:05}-of-{len(parts):05}.safetensors" for number in range(1, len(parts) + 1)]
    for file, part in zip(files if len(parts) > 1 else [SINGLE_FILE], parts, strict=True):
        for written in write_file(directory / file, part, dtype):
            advance(written)
    if len(parts) > 1:
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _into_parts(
    weights: Mapping[str, LazyArray], dtype: DTypeLike | None, max_bytes: int
) -> list[dict[str, LazyArray]]:
    """The weights in turn, in parts of at most `max_bytes`; a larger weight is a part of its own."""
    parts: list[dict[str, LazyArray]] = [{}]
    room = max_bytes
    for name, weight in weights.items():
        size = _num_bytes(weight, dtype)
        if size > room and parts[-1]:
            parts.append({})
            room = max_bytes
        parts[-1][name] = weight
        room -= size
    return parts


def _check_room(directory: pathlib.Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(f"{directory.parent} has {free:,} bytes left, and the weights need {needed:,}; make room")


def _copy_tokenizer(source: ModelSource, directory: pathlib.Path) -> tuple[str, ...]:
    """Puts the tokenizer's files beside the weights. Says why not, if the source has none that can be written."""
    if isinstance(source, Mapping | WeightFunction):
        return ("no tokenizer: arrays have none",)
    path = pathlib.Path(source)
    if path.is_dir():
        for name in _COPIED:
            if (path / name).is_file():
                shutil.copyfile(path / name, directory / name)
        return ()
    try:
        load_tokenizer(path).save_pretrained(directory)
    except (ValueError, NotImplementedError) as error:
        return (f"no tokenizer: {error}",)
    return ()
