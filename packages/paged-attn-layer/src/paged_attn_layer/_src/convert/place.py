"""Puts weights on their devices, a shard at a time."""

import collections
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Sharding
from jax.typing import DTypeLike
from jaxtyping import Array

from paged_attn_layer._src.convert.lazy import Index, LazyArray, Shape


def place(weight: LazyArray, dtype: DTypeLike, sharding: Sharding | None = None) -> Array:
    """The weight on its devices, in a type. The host holds one shard at a time, and reads only what devices need.

    Args:
        weight: what is read.
        dtype: the type that it is cast to.
        sharding: which device gets which part; `None` puts all of it on the default device.
    """
    if sharding is None:
        return jax.device_put(weight.read(dtype=dtype))
    shards: list[Array] = []
    for index, devices in _devices_by_part(weight.shape, sharding):
        part = weight.read(index, dtype)
        shards += jax.block_until_ready([jax.device_put(part, device) for device in devices])
    return jax.make_array_from_single_device_arrays(weight.shape, sharding, shards)


def _devices_by_part(shape: Shape, sharding: Sharding) -> Iterator[tuple[Index, list[Any]]]:
    """Each different part, with the devices of this process that hold it."""
    parts = collections.defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        parts[tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))].append(device)
    for ends, devices in parts.items():
        yield tuple(slice(*each) for each in ends), devices
