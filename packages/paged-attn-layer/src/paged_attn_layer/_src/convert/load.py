"""Loads the weights of a checkpoint into a model, a few at a time."""

import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

import jax.numpy as jnp
from eformer.escale import PartitionManager
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array

from paged_attn_layer._src.convert.extras import needs_extra
from paged_attn_layer._src.convert.lazy import LazyArray
from paged_attn_layer._src.convert.memory_source import WeightFunction, memory_weights
from paged_attn_layer._src.convert.place import place
from paged_attn_layer._src.convert.progress import byte_progress
from paged_attn_layer._src.convert.source import ConversionError, WeightSource, reading
from paged_attn_layer._src.convert.weights import WeightMatch, make_weights, match_weights
from paged_attn_layer._src.models.causal_lm import CausalLM
from paged_attn_layer._src.models.family import Family
from paged_attn_layer._src.models.registry import find_family
from paged_cache import HFConfig

ModelSource = str | os.PathLike[str] | Mapping[str, Any] | WeightFunction
"""Where weights come from: a path, arrays by name, or a function that makes them."""
ORBAX_FOLDER = "orbax"
"""Where a directory that `save_model` wrote has the weights, if it wrote them for orbax."""


def load_model(
    source: ModelSource,
    *,
    config: Mapping[str, Any] | None = None,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    partition_manager: PartitionManager | None = None,
    max_positions: int | None = None,
    progress: bool = False,
) -> CausalLM:
    """The model of a Hugging Face directory, a GGUF file, an orbax checkpoint, or arrays by name; without torch.

    Everything is checked before the first weight is read. The weights are then read, changed, cast and placed one after
    the other, and each shard by shard. Beside the model, the host holds one shard.

    Args:
        source: a directory with `config.json` and `model.safetensors` (or its shards and index), a `.gguf` file, or a
            directory that `save_model` or `paged-convert` wrote. Or arrays of numpy, jax or torch by Hugging Face name,
            such as a `state_dict()`. Or a `WeightFunction`.
        config: with arrays, the content of the model's `config.json`; with a path, it must be left out.
        dtype: type of the weights; the model computes in it.
        mesh: the devices to split the weights over, as the family says; `None` puts them on the default device.
        partition_manager: names the mesh axes to split over; `None` means `"tp"`, and `"ep"` for experts.
        max_positions: the longest sequence to be served; `None` means the length that the model was trained for.
            Rotary embedding of type `dynamic` or `longrope` has other frequencies for longer ones.
        progress: show a bar with bytes and rate on standard error (needs tqdm).

    Raises:
        ValueError: a file is missing or broken, a setting is wrong, `dtype` is not a floating type of 16 bits or more,
            or the mesh has Explicit axes. `ConversionError`, a kind of it, where weights don't fit the model; it lists
            all of them.
        NotImplementedError: the architecture, or a setting that changes the result, is not supported.
        ModuleNotFoundError: safetensors, gguf or orbax is not installed; says what to install.
    """
    check_dtype(dtype)
    _check_mesh(mesh)
    matched = match_checkpoint(open_checkpoint(source, config), dtype, max_positions, partition_manager)
    with byte_progress("loading", matched.num_bytes(dtype), show=progress) as advance:
        for path, weight in matched.weights():
            variable = matched.variables[path]  # of another type than the rest, where the model wants it so
            placed = place(weight, variable.dtype, matched.sharding(path, mesh, partition_manager))
            variable.set_value(placed)
            advance(placed.nbytes)
    return cast(CausalLM, nnx.merge(matched.graph, matched.state))


@dataclasses.dataclass(frozen=True)
class MatchedCheckpoint:
    """A checkpoint that fits its model: each weight of the model has its place. Nothing is read yet."""

    source: WeightSource
    family: Family
    config: Any
    """The family's config."""
    graph: nnx.GraphDef
    state: nnx.State
    variables: Mapping[str, nnx.Variable]
    """The variables of `state` by path; they have shapes, and no weights."""
    matches: tuple[WeightMatch, ...]

    def weights(self) -> Iterator[tuple[str, LazyArray]]:
        """The model's weights by path."""
        return make_weights(self.source, self.matches)

    def stored(self) -> Iterator[tuple[str, LazyArray]]:
        """The same weights under the names that they have in the checkpoint."""
        for match in self.matches:
            for name, _ in match.sources:
                yield name, self.source.weight(name)

    def num_bytes(self, dtype: DTypeLike) -> int:
        """The bytes of all weights of the model in a type."""
        return sum(math.prod(weight.shape) for weight in self.variables.values()) * jnp.dtype(dtype).itemsize

    def sharding(self, path: str, mesh: Mesh | None, manager: PartitionManager | None) -> NamedSharding | None:
        """How a weight is split over a mesh; `None` without one."""
        if mesh is None:
            return None
        # eformer annotates its modes, which are strings, as int.
        spec = self.family.partition_spec(path, self.config, mesh, manager)  # pyright: ignore[reportArgumentType]
        return NamedSharding(mesh, spec)


def match_checkpoint(
    source: WeightSource,
    dtype: DTypeLike,
    max_positions: int | None = None,
    partition_manager: PartitionManager | None = None,
) -> MatchedCheckpoint:
    """Finds the place of each weight of the model in a checkpoint. Nothing is read.

    Raises:
        ValueError: a setting is wrong. `ConversionError`, a kind of it, where weights don't fit; it lists all of them.
        NotImplementedError: the architecture, or a setting that changes the result, is not supported.
    """
    family, config = _read_settings(source, max_positions)
    # eformer annotates its modes, which are strings, as int.
    config = family.with_mesh_axes(config, partition_manager)  # pyright: ignore[reportArgumentType]
    graph, state = nnx.split(abstract_model(family, config, dtype))
    variables = variables_by_path(state)
    shapes = {path: variable.shape for path, variable in variables.items()}
    return MatchedCheckpoint(
        source, family, config, graph, state, variables, match_weights(source, shapes, family.weights(config))
    )


def variables_by_path(state: nnx.State) -> dict[str, nnx.Variable]:
    """The variables of a model's state, each under its path: `layers.0.mlp.up_proj.kernel`."""
    return {".".join(map(str, keys)): variable for keys, variable in nnx.to_flat_state(state)}


def open_checkpoint(source: ModelSource, config: Mapping[str, Any] | None = None) -> WeightSource:
    """The weights and the config of a source. Of files, only the headers are read.

    Raises:
        ValueError: nothing is there, it is neither a directory nor a `.gguf` file, or it is broken. Or `config` is
            missing beside arrays, or given beside a path.
        ModuleNotFoundError: safetensors, gguf or orbax is not installed; says what to install.
    """
    if isinstance(source, Mapping | WeightFunction):
        if not isinstance(config, Mapping):
            raise ValueError(f"config={config!r} must be the content of the model's config.json: arrays have none")
        return memory_weights(source, config)
    if config is not None:
        raise ValueError(f"config must be left out, for {source} has its own; change it there")
    return _open_path(pathlib.Path(source))


def _open_path(path: pathlib.Path) -> WeightSource:
    if (path / ORBAX_FOLDER).is_dir():
        with needs_extra("orbax"):
            from paged_attn_layer._src.convert.orbax_directory import OrbaxDirectory  # noqa: PLC0415
        return OrbaxDirectory(path)
    if path.is_dir():
        with needs_extra("hf"):
            from paged_attn_layer._src.convert.hf_directory import HFDirectory  # noqa: PLC0415
        return HFDirectory(path)
    if path.suffix == ".gguf":
        with needs_extra("hf"):
            from paged_attn_layer._src.convert.gguf_file import GGUFFile  # noqa: PLC0415
        return GGUFFile(path)
    kind = "is neither a directory nor a .gguf file" if path.exists() else "does not exist"
    raise ValueError(f"{path} {kind}; give a Hugging Face model directory or a .gguf file")


def _read_settings(source: WeightSource, max_positions: int | None) -> tuple[Family, Any]:
    """The checkpoint's family, and the config of its model."""
    with reading(source.settings_from):
        settings = HFConfig.of(source.config if max_positions is None else _with_length(source.config, max_positions))
        family = find_family(settings)
        _check_layers(source, settings.whole("num_hidden_layers"))
        return family, family.read_config(settings)


def _with_length(config: Mapping[str, Any], max_positions: int) -> dict[str, Any]:
    """The config with the length where `read_rope` looks for it: beside the other keys of the text model."""
    if isinstance(config.get("text_config"), Mapping):
        return {**config, "text_config": {**config["text_config"], "max_positions": max_positions}}
    return {**config, "max_positions": max_positions}


def _check_layers(source: WeightSource, layers: int) -> None:
    """Raises an error if there are fewer layers than the settings say: a model of all of them may take years to build.

    The first number in the name of a weight is its layer's.
    """
    found = len({numbers[0] for name in source.shapes if (numbers := re.findall(r"\b\d+\b", name))})
    if layers > found:
        line = f"num_hidden_layers (block_count in a GGUF file) is {layers}, and there are weights of {found} layers"
        raise ConversionError(source.where, source.problems or [line])


def abstract_model(family: Family, config: Any, dtype: DTypeLike) -> CausalLM:
    """The model with shapes in place of weights: nothing is computed."""

    def build() -> CausalLM:
        rngs = nnx.Rngs(0)
        rngs.default = _OneKey(0, tag="default")  # pyright: ignore[reportAttributeAccessIssue]
        return family.build(config, param_dtype=dtype, rngs=rngs)

    return nnx.eval_shape(build)


class _OneKey(nnx.RngStream):
    """Returns the same key always, for a model of which only the shapes are used.

    A stream that counts makes each key depend on all keys before it. Tracing a model then takes time that grows with
    the square of its layers.
    """

    def __call__(self) -> Array:
        return self.key[...]


def check_dtype(dtype: DTypeLike) -> None:
    """Raises an error if weights cannot have this type.

    Raises:
        ValueError: it is not a floating type of 16 bits or more.
    """
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        raise ValueError(f"dtype={dtype!r} must be the name of a type, such as 'float32' or 'bfloat16'") from None
    if not jnp.issubdtype(found, jnp.floating) or jnp.finfo(found).bits < 16:
        raise ValueError(f"dtype={found.name} must be a floating type of 16 bits or more, such as float32 or bfloat16")


def _check_mesh(mesh: Mesh | None) -> None:
    if mesh is not None and AxisType.Explicit in mesh.axis_types:
        raise ValueError(
            f"mesh has axis_types={mesh.axis_types}, which must be Auto, for XLA splits the projections; "
            "build it with jax.make_mesh(..., axis_types=(AxisType.Auto, ...))"
        )
