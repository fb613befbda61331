"""Pages in the host's memory, for sequences that have been swapped out."""

import math
from collections.abc import Sequence
from typing import Self

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Int32

from paged_cache._src.cache.cache import PagedAttentionCache
from paged_cache._src.transfer.contents import check_alike, content_shape, replica_of
from paged_kernels import KVPages

PINNED = "pinned_host"
"""jax's name for host memory that devices copy from and to by themselves."""

Held = dict[tuple[int, jax.Device], Array | np.ndarray]
"""A content on the host: of each of its arrays, by number, what each device had."""


class HostPages:
    """Room on the host for the contents of `num_pages` pages of each replica, in parts as the devices have them.

    They lie in pinned memory where the devices have that kind, and a copy then does not wait for the host; otherwise
    in numpy arrays. A host page takes memory when it is first used, and keeps it. `apply_moves` fills and reads host
    pages; which of them holds what is `PageManager`'s to know.
    """

    def __init__(self, num_pages: int, shape: KVPages, groups: int, memory_kind: str | None) -> None:
        """See `create`.

        Args:
            num_pages: host pages of each replica.
            shape: of a content, as `content_shape` gives it.
            groups: replicas.
            memory_kind: jax's name of the memory that the pages shall lie in; `None` for numpy arrays.
        """
        self.num_pages = num_pages
        self.memory_kind = memory_kind
        self._shape = shape
        views = shape.data.shape[0] // groups
        parts = shape.data.sharding.addressable_devices_indices_map(shape.data.shape)
        self._groups = {device: replica_of(part, views) for device, part in parts.items()}
        self._held: dict[tuple[int, int], Held] = {}  # by replica and host page

    @classmethod
    def create(cls, cache: PagedAttentionCache, num_host_pages: int) -> Self:
        """Room for pages of this cache.

        Raises:
            ValueError: `num_host_pages` is below 1.
            NotImplementedError: the layers' pages are not all of one shape.
        """
        if num_host_pages < 1:
            raise ValueError(
                f"num_host_pages={num_host_pages} must be at least 1; to swap nothing, create no HostPages"
            )
        check_alike(cache)
        shape = content_shape(cache)
        memories = [device.addressable_memories() for device in shape.data.sharding.addressable_devices]
        pinned = all(PINNED in {memory.kind for memory in each} for each in memories)
        return cls(num_host_pages, shape, cache.views[0].replicas, PINNED if pinned else None)

    @property
    def nbytes(self) -> int:
        """Bytes that the host pages of this process take now."""
        return sum(part.nbytes for held in self._held.values() for part in held.values())

    @property
    def max_nbytes(self) -> int:
        """Bytes that they take when all of them have been used."""
        arrays = jax.tree.leaves(self._shape)
        part = sum(math.prod(one.sharding.shard_shape(one.shape)) * one.dtype.itemsize for one in arrays)
        return self.num_pages * part * len(self._groups)

    def store(
        self, host_pages: Int32[np.ndarray, "replicas n"], contents: Sequence[KVPages]
    ) -> list[Array] | list[np.ndarray]:
        """Copy these contents to these host pages; a group's part for host page 0 goes nowhere.

        Returns:
            the copies, to wait for: those in pinned memory may still be under way.
        """
        names, parts = [], []
        for column, content in zip(host_pages.T.tolist(), contents, strict=True):
            for number, array in enumerate(jax.tree.leaves(content)):
                for shard in array.addressable_shards:
                    group = self._groups[shard.device]
                    if column[group]:
                        names.append(((group, column[group]), (number, shard.device)))
                        parts.append(shard.data)
        copies = self._to_host(parts)
        for (page, part_of), copy in zip(names, copies, strict=True):
            self._held.setdefault(page, {})[part_of] = copy
        return copies

    def held(self, host_pages: Int32[np.ndarray, "replicas n"]) -> list[Held]:
        """What these host pages hold in this process, whatever is stored in them later; of host page 0 nothing.

        Raises:
            ValueError: a host page has never been stored.
        """
        held, here = [], set(self._groups.values())  # other processes have the devices of other groups
        for column in host_pages.T.tolist():
            pages = [(group, page) for group, page in enumerate(column) if page and group in here]
            held.append({name: part for page in pages for name, part in self._stored(page).items()})
        return held

    def to_devices(self, held: Sequence[Held]) -> list[KVPages]:
        """Contents on the devices; zeros for a group of which nothing is held."""
        names = [(number, device) for number in range(len(jax.tree.leaves(self._shape))) for device in self._groups]
        parts = [one[name] if name in one else self._zeros(name[0]) for one in held for name in names]
        placed = iter(jax.device_put(parts, [SingleDeviceSharding(device) for _ in held for _, device in names]))

        def join(shape: jax.ShapeDtypeStruct) -> Array:
            return jax.make_array_from_single_device_arrays(
                shape.shape, shape.sharding, [next(placed) for _ in self._groups]
            )

        return [jax.tree.map(join, self._shape) for _ in held]

    def _stored(self, page: tuple[int, int]) -> Held:
        if page not in self._held:
            raise ValueError(
                f"host page {page[1]} of replica {page[0]} holds nothing; give apply_moves every list of "
                "PageManager.take_moves, in order, and the same HostPages each time"
            )
        return self._held[page]

    def _zeros(self, number: int) -> np.ndarray:
        shape = jax.tree.leaves(self._shape)[number]
        return np.zeros(shape.sharding.shard_shape(shape.shape), shape.dtype)

    def _to_host(self, parts: list[Array]) -> list[Array] | list[np.ndarray]:
        if self.memory_kind is None:
            return [np.asarray(part) for part in parts]
        return jax.device_put(parts, [part.sharding.with_memory_kind(self.memory_kind) for part in parts])
