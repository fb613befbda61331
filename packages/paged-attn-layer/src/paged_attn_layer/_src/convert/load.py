"""Loads the weights of a checkpoint into a model, a few at a time."""

import os
import pathlib
import re
from typing import Any, cast

import jax.numpy as jnp
from eformer.escale import PartitionManager
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array

from paged_attn_layer._src.convert.extras import needs_extra
from paged_attn_layer._src.convert.place import place
from paged_attn_layer._src.convert.source import ConversionError, WeightSource, reading
from paged_attn_layer._src.convert.weights import make_weights, match_weights
from paged_attn_layer._src.models.causal_lm import CausalLM
from paged_attn_layer._src.models.family import Family
from paged_attn_layer._src.models.registry import find_family
from paged_cache import HFConfig


def load_model(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    partition_manager: PartitionManager | None = None,
) -> CausalLM:
    """The model of a Hugging Face directory (safetensors) or a GGUF file, without torch.

    Everything is checked before the first weight is read. The model's weights are then read, cast and placed one after
    the other. Those that are made of the same weights of the checkpoint are made together, so each is read once. Beside
    the model, the host holds what one of them is made of.

    Args:
        path: a directory with `config.json` and `model.safetensors` (or its shards and index), or a `.gguf` file.
        dtype: type of the weights; the model computes in it.
        mesh: the devices to split the weights over, as the family says; `None` puts them on the default device.
        partition_manager: names the mesh axis to split over; `None` means `"tp"`.

    Raises:
        ValueError: a file is missing or broken, a setting is wrong, `dtype` is not a floating type of 16 bits or more,
            or the mesh has Explicit axes. `ConversionError`, a kind of it, where weights don't fit the model; it lists
            all of them.
        NotImplementedError: the architecture, or a setting that changes the result, is not supported.
        ModuleNotFoundError: safetensors or gguf is not installed; says what to install.
    """
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 16:
        raise ValueError(
            f"dtype={jnp.dtype(dtype).name} must be a floating type of 16 bits or more, such as float32 or bfloat16"
        )
    _check_mesh(mesh)
    source = open_checkpoint(path)
    family, config = _read_settings(source)
    graph, state = nnx.split(_abstract_model(family, config, dtype))
    weights = {".".join(map(str, keys)): weight for keys, weight in nnx.to_flat_state(state)}
    matches = match_weights(source, {path: weight.shape for path, weight in weights.items()}, family.weights(config))
    for target, weight in make_weights(source, matches):
        sharding = _sharding(family, target, config, mesh, partition_manager)
        weights[target].set_value(place(weight, dtype, sharding))
    return cast(CausalLM, nnx.merge(graph, state))


def open_checkpoint(path: str | os.PathLike[str]) -> WeightSource:
    """The checkpoint at `path`, its headers read.

    Raises:
        ValueError: nothing is there, it is neither a directory nor a `.gguf` file, or it is broken.
        ModuleNotFoundError: safetensors or gguf is not installed; says what to install.
    """
    path = pathlib.Path(path)
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


def _read_settings(source: WeightSource) -> tuple[Family, Any]:
    """The checkpoint's family, and the config of its model."""
    with reading(source.settings_from):
        settings = HFConfig.of(source.config)
        family = find_family(settings)
        _check_layers(source, settings.whole("num_hidden_layers"))
        return family, family.read_config(settings)


def _check_layers(source: WeightSource, layers: int) -> None:
    """Raises an error if there are fewer layers than the settings say: a model of all of them may take years to build.

    The first number in the name of a weight is its layer's.
    """
    found = len({numbers[0] for name in source.shapes if (numbers := re.findall(r"\b\d+\b", name))})
    if layers > found:
        line = f"num_hidden_layers (block_count in a GGUF file) is {layers}, and there are weights of {found} layers"
        raise ConversionError(source.where, source.problems or [line])


def _abstract_model(family: Family, config: Any, dtype: DTypeLike) -> CausalLM:
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


def _sharding(
    family: Family, path: str, config: Any, mesh: Mesh | None, partition_manager: PartitionManager | None
) -> NamedSharding | None:
    if mesh is None:
        return None
    # eformer annotates its modes, which are strings, as int.
    spec = family.partition_spec(path, config, mesh, partition_manager)  # pyright: ignore[reportArgumentType]
    return NamedSharding(mesh, spec)


def _check_mesh(mesh: Mesh | None) -> None:
    if mesh is not None and AxisType.Explicit in mesh.axis_types:
        raise ValueError(
            f"mesh has axis_types={mesh.axis_types}, which must be Auto, for XLA splits the projections; "
            "build it with jax.make_mesh(..., axis_types=(AxisType.Auto, ...))"
        )
