"""Weights that no file holds: arrays in memory, and arrays that a function makes. torch is not imported."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from paged_attn_layer._src.convert.hf_weights import HFWeights
from paged_attn_layer._src.convert.lazy import Index, LazyArray, Shape


@dataclasses.dataclass(frozen=True)
class WeightFunction:
    """Weights that a function makes when they are needed, under Hugging Face's names.

        weights = WeightFunction({"model.norm.weight": (64,), ...}, read=pipeline.fetch)
        model = load_model(weights, config=config)

    The function is asked for one weight at a time. The last one is kept, for all that is made of it.
    """

    shapes: Mapping[str, Shape]
    """The shape of each weight by name."""
    read: Callable[[str], Any]
    """Makes the array of a name: one of numpy, jax or torch."""

    def lazy(self) -> dict[str, LazyArray]:
        """The weights by name; nothing is made."""
        last: dict[str, np.ndarray] = {}

        def made(name: str, shape: Shape) -> np.ndarray:
            if name not in last:
                last.clear()
                last[name] = on_host(self.read(name))
            if last[name].shape != shape:
                raise ValueError(f"read({name!r}) has shape {last[name].shape}; it must be {shape}, as `shapes` says")
            return last[name]

        def one(name: str, shape: Shape) -> LazyArray:
            return LazyArray.of_rows(
                shape, np.float32, lambda start, stop: np.atleast_1d(made(name, shape))[start:stop]
            )

        return {name: one(name, tuple(shape)) for name, shape in self.shapes.items()}


def memory_weights(weights: Mapping[str, Any] | WeightFunction, config: Mapping[str, Any]) -> HFWeights:
    """The weights as a checkpoint.

    Args:
        weights: arrays by Hugging Face name (numpy, jax, torch), or a function that makes them.
        config: the content of the model's config.json.
    """
    if isinstance(weights, WeightFunction):
        return HFWeights("the function's weights", "config", config, weights.lazy())
    if wrong := [name for name in weights if not isinstance(name, str)]:
        raise ValueError(f"the name {wrong[0]!r} of a weight must be a text, as in Hugging Face's checkpoints")
    problems = [
        f"{name} is a {type(array).__name__} of type {getattr(array, 'dtype', None)}; "
        "it must be an array of floating numbers of 16 bits or more"
        for name, array in weights.items()
        if not _is_plain(array)
    ]
    lazy = {name: lazy_array(array) if _is_plain(array) else None for name, array in weights.items()}
    return HFWeights("the mapping of weights", "config", config, lazy, problems)


def lazy_array(array: Any) -> LazyArray:
    """An array of numpy, jax or torch as a lazy one; it comes to the host when a part is read."""

    def fill(out: np.ndarray, index: Index) -> None:
        LazyArray.of(on_host(array)).fill(out, index)

    return LazyArray(tuple(array.shape), jnp.dtype(_type_name(array)), fill)


def on_host(array: Any) -> np.ndarray:
    """An array of numpy, jax or torch as one of numpy; without a copy, if it is in this machine's memory.

    numpy has no bfloat16, so torch's is taken by its bits. jax keeps what is read of an array as long as that lives, so
    a copy is read.
    """
    if isinstance(array, jax.Array):
        return np.asarray(array if _is_in_host_memory(array) else jnp.copy(array))
    if not hasattr(array, "detach"):
        return np.asarray(array)
    tensor = array.detach().cpu()
    if _type_name(tensor) != "bfloat16":
        return tensor.numpy()
    bits = tensor.new_empty(0).short().dtype
    return tensor.view(bits).numpy().view(ml_dtypes.bfloat16)


def _type_name(array: Any) -> str:
    return str(array.dtype).removeprefix("torch.")


def _is_plain(array: Any) -> bool:
    """True for an array of a type that weights may have."""
    plain = ("float64", "float32", "float16", "bfloat16")
    return hasattr(array, "shape") and hasattr(array, "dtype") and _type_name(array) in plain


def _is_in_host_memory(array: jax.Array) -> bool:
    devices = array.devices()
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"
