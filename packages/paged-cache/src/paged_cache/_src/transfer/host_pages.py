"""Pages in host memory, for swapped-out sequences."""

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
"""jax's name for pinned host memory: devices copy from and to it without the host."""

HostContent = dict[tuple[int, jax.Device], Array | np.ndarray]
"""A content on the host: the part of each device, by `(number of the array, device)`."""


class HostPages:
    """Host memory for the contents of `num_pages` pages per replica, split into the parts of each device.

    Uses pinned memory if the devices have it; a copy then does not wait for the host. Otherwise uses numpy arrays. A
    host page gets its memory at its first use and keeps it. `apply_moves` writes and reads host pages. `PageManager`
    knows which sequence uses which.
    """

    def __init__(self, num_pages: int, shape: KVPages, replicas: int, memory_kind: str | None) -> None:
        """See `create`.

        Args:
            num_pages: host pages of each replica.
            shape: `content_shape` of the cache.
            replicas: number of replicas.
            memory_kind: jax's name of the memory to use; `None` for numpy arrays.
        """
        self.num_pages = num_pages
        self.memory_kind = memory_kind
        self._shape = shape
        views = shape.data.shape[0] // replicas
        parts = shape.data.sharding.addressable_devices_indices_map(shape.data.shape)
        self._replicas = {device: replica_of(part, views) for device, part in parts.items()}
        self._contents: dict[tuple[int, int], HostContent] = {}  # by replica and host page

    @classmethod
    def create(cls, cache: PagedAttentionCache, num_host_pages: int) -> Self:
        """Create host pages for this cache.

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
        """Bytes that the host pages of this process use now."""
        return sum(part.nbytes for content in self._contents.values() for part in content.values())

    @property
    def max_nbytes(self) -> int:
        """Bytes that the host pages of this process use at most."""
        arrays = jax.tree.leaves(self._shape)
        part = sum(math.prod(one.sharding.shard_shape(one.shape)) * one.dtype.itemsize for one in arrays)
        return self.num_pages * part * len(self._replicas)

    def store(
        self, host_pages: Int32[np.ndarray, "replicas n"], contents: Sequence[KVPages]
    ) -> list[Array] | list[np.ndarray]:
        """Copy contents to host pages. Host page 0 is skipped.

        Returns the copies, so that the caller can wait: copies to pinned memory may still be running.
        """
        names, parts = [], []
        for column, content in zip(host_pages.T.tolist(), contents, strict=True):
            for number, array in enumerate(jax.tree.leaves(content)):
                for shard in array.addressable_shards:
                    replica = self._replicas[shard.device]
                    if column[replica]:
                        names.append(((replica, column[replica]), (number, shard.device)))
                        parts.append(shard.data)
        copies = self._to_host(parts)
        for (page, part_of), copy in zip(names, copies, strict=True):
            self._contents.setdefault(page, {})[part_of] = copy
        return copies

    def snapshot(self, host_pages: Int32[np.ndarray, "replicas n"]) -> list[HostContent]:
        """Snapshot these host pages; page 0 is skipped. Later calls of `store` do not change the snapshots.

        Raises:
            ValueError: a host page has never been written.
        """
        snapshots, here = [], set(self._replicas.values())  # other processes have the devices of other replicas
        for column in host_pages.T.tolist():
            pages = [(replica, page) for replica, page in enumerate(column) if page and replica in here]
            snapshots.append({name: part for page in pages for name, part in self._content_of(page).items()})
        return snapshots

    def to_devices(self, snapshots: Sequence[HostContent]) -> list[KVPages]:
        """Send snapshots to the devices; zeros for a replica without a snapshot."""
        names = [(number, device) for number in range(len(jax.tree.leaves(self._shape))) for device in self._replicas]
        parts = [one[name] if name in one else self._zeros(name[0]) for one in snapshots for name in names]
        placed = iter(jax.device_put(parts, [SingleDeviceSharding(device) for _ in snapshots for _, device in names]))

        def join(shape: jax.ShapeDtypeStruct) -> Array:
            return jax.make_array_from_single_device_arrays(
                shape.shape, shape.sharding, [next(placed) for _ in self._replicas]
            )

        return [jax.tree.map(join, self._shape) for _ in snapshots]

    def _content_of(self, page: tuple[int, int]) -> HostContent:
        if page not in self._contents:
            raise ValueError(
                f"host page {page[1]} of replica {page[0]} holds nothing; give apply_moves every list of "
                "PageManager.take_moves, in order, and the same HostPages each time"
            )
        return self._contents[page]

    def _zeros(self, number: int) -> np.ndarray:
        shape = jax.tree.leaves(self._shape)[number]
        return np.zeros(shape.sharding.shard_shape(shape.shape), shape.dtype)

    def _to_host(self, parts: list[Array]) -> list[Array] | list[np.ndarray]:
        if self.memory_kind is None:
            return jax.device_get(parts)
        return jax.device_put(parts, [part.sharding.with_memory_kind(self.memory_kind) for part in parts])
