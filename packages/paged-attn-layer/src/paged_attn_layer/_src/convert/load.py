"""A model with the weights of a checkpoint, filled one tensor at a time."""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from eformer.escale import PartitionManager
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.typing import DTypeLike
from jaxtyping import Array

from paged_attn_layer._src.convert.extras import needs_extra
from paged_attn_layer._src.convert.rules import LLAMA_RULES, Filling, plan
from paged_attn_layer._src.convert.source import WeightSource
from paged_attn_layer._src.easydel.registry import AttentionMetadata
from paged_attn_layer._src.models.config import ModelConfig
from paged_attn_layer._src.models.decoder import Decoder
from paged_attn_layer._src.models.sharding import partition_spec


def load_model(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    partition_manager: PartitionManager | None = None,
) -> Decoder:
    """The model of a Hugging Face directory (safetensors) or a GGUF file, without torch.

    Everything is checked before the first weight is read. Weights are then read, cast and placed one at a time, so
    that the host holds about one beside the model.

    Args:
        path: a directory with `config.json` and `model.safetensors` (or its shards and index), or a `.gguf` file.
        dtype: type of the weights; the model computes in it.
        mesh: the devices to split the weights over (`partition_spec`); `None` puts them on the default device.
        partition_manager: names the mesh axis to split over; `None` means `"tp"`.

    Raises:
        ValueError: a file is missing or broken, a setting is wrong, `dtype` is not a floating type, or the mesh has
            Explicit axes. `ConversionError`, a kind of it, where weights don't fit the model; it lists all of them.
        NotImplementedError: the architecture, or a setting that changes the result, is not supported.
        ModuleNotFoundError: safetensors or gguf is not installed; says what to install.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype={jnp.dtype(dtype).name} must be a floating type, such as float32 or bfloat16")
    _check_mesh(mesh)
    source = open_checkpoint(path)
    config = ModelConfig.from_hf(source.config)
    metadata = None if mesh is None else AttentionMetadata(mesh=mesh, partition_manager=partition_manager)
    graph, state = nnx.split(_abstract_model(config, metadata, dtype))
    targets = {".".join(map(str, keys)): weight for keys, weight in nnx.to_flat_state(state)}
    fillings = plan(
        source,
        {name: weight.shape for name, weight in targets.items()},
        LLAMA_RULES,
        tied=config.tie_word_embeddings,
    )
    for name, weight in targets.items():
        sharding = _sharding(name, config, mesh, partition_manager)
        weight.set_value(_place(source, fillings[name], dtype, sharding))
    return nnx.merge(graph, state)


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


def _abstract_model(config: ModelConfig, metadata: AttentionMetadata | None, dtype: DTypeLike) -> Decoder:
    """The model with shapes in place of weights: nothing is computed."""
    return nnx.eval_shape(lambda: Decoder(config, metadata=metadata, param_dtype=dtype, rngs=nnx.Rngs(0)))


def _sharding(
    path: str, config: ModelConfig, mesh: Mesh | None, partition_manager: PartitionManager | None
) -> Sharding | None:
    if mesh is None:
        return None
    # eformer annotates its modes, which are strings, as int.
    return NamedSharding(mesh, partition_spec(path, config, mesh, partition_manager))  # pyright: ignore[reportArgumentType]


def _place(source: WeightSource, filling: Filling, dtype: DTypeLike, sharding: Sharding | None) -> Array:
    weight = filling.transform(source.read(filling.name))
    return jax.device_put(np.array(weight, dtype=dtype, order="C"), sharding)


def _check_mesh(mesh: Mesh | None) -> None:
    if mesh is not None and AxisType.Explicit in mesh.axis_types:
        raise ValueError(
            f"mesh has axis_types={mesh.axis_types}, which must be Auto, for XLA splits the projections; "
            "build it with jax.make_mesh(..., axis_types=(AxisType.Auto, ...))"
        )
