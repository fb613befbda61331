"""Puts weights on their devices, a shard at a time."""

import jax
from jax.sharding import Sharding
from jax.typing import DTypeLike
from jaxtyping import Array

from paged_attn_layer._src.convert.lazy import Index, LazyArray


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


def _devices_by_part(shape: tuple[int, ...], sharding: Sharding) -> list[tuple[Index, list[jax.Device]]]:
    """Each different part, with the devices of this process that hold it."""
    parts: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        ends = tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))
        parts.setdefault(ends, []).append(device)
    return [(tuple(slice(*ends) for ends in part), devices) for part, devices in parts.items()]
