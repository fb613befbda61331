"""A directory with a `config.json` and an orbax checkpoint of the model's weights, under their paths in the model.

orbax writes the checkpoint. Parts of its arrays are read with tensorstore, on which orbax is built. So a device's part
of a weight is read alone, however the checkpoint was split when it was written.
"""

import pathlib
from collections.abc import Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax import traverse_util

from paged_attn_layer._src.convert.hf_directory import read_config_file, read_json
from paged_attn_layer._src.convert.hf_weights import HFWeights
from paged_attn_layer._src.convert.lazy import LazyArray
from paged_attn_layer._src.convert.load import ORBAX_FOLDER
from paged_attn_layer._src.convert.source import CONFIG_FILE, reading
from paged_attn_layer._src.convert.weights import export_weights
from paged_attn_layer._src.models.registry import find_family
from paged_cache import HFConfig

_CHUNK = 16 << 20
"""Bytes that are compressed together, and so read together."""


class OrbaxDirectory(HFWeights):
    """The weights of an orbax checkpoint, under the names that they have in a Hugging Face checkpoint.

    Raises:
        ValueError: config.json or the checkpoint is missing or broken, or a weight is not one of the model's.
        NotImplementedError: the architecture, or a setting that changes the result, is not supported.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        settings_from = directory / CONFIG_FILE
        config = read_config_file(directory)
        with reading(settings_from):
            settings = HFConfig.of(config)
            family = find_family(settings)
            rules = family.weights(family.read_config(settings))
        with reading(directory / ORBAX_FOLDER):
            weights = dict(export_weights(_open_arrays(directory / ORBAX_FOLDER), rules))
        super().__init__(str(directory), str(settings_from), config, weights)


def write_orbax(directory: pathlib.Path, weights: Mapping[str, jax.Array]) -> None:
    """Writes a model's weights by path. Each device's part is written from the device."""
    tree = traverse_util.unflatten_dict(dict(weights), sep=".")
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK), tree)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((directory / ORBAX_FOLDER).absolute(), tree, save_args=chunks)


def _open_arrays(checkpoint: pathlib.Path) -> dict[str, LazyArray]:
    """The arrays of a checkpoint by path."""
    metadata = read_json(checkpoint / "_METADATA", "an orbax checkpoint has one")
    driver = "zarr3" if metadata["use_zarr3"] else "zarr"
    keys = [[key["key"] for key in entry["key_metadata"]] for entry in metadata["tree_metadata"].values()]
    return {path: _lazy(checkpoint.absolute(), driver, path) for path in map(".".join, keys)}


def _lazy(checkpoint: pathlib.Path, driver: str, path: str) -> LazyArray:
    store = {"driver": "ocdbt", "base": f"file://{checkpoint}/", "path": f"{path}/"}
    array = tensorstore.open({"driver": driver, "kvstore": store}, open=True, read=True).result()

    def rows(start: int, stop: int) -> np.ndarray:
        with reading(checkpoint):
            return np.atleast_1d((array[start:stop] if array.shape else array).read().result())

    chunk = next(iter(array.chunk_layout.read_chunk.shape or ()), None) or 1  # rows; an array without axes has none
    return LazyArray.of_rows(array.shape, array.dtype.numpy_dtype, rows, at_once=chunk)
