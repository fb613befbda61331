"""The sizes of a cache, and how many pages fit into memory."""

import dataclasses
import os
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from paged_cache._src.cache.sharding import PartitionManager, axis_size, kv_head_axis
from paged_kernels import KVLayout, KVPages

HOST_MEMORY_FRACTION = 1 / 8
"""Share of the host's memory that a cache may take where devices report none (CPU): the model and others live there
too, and inside a container the limit may be lower than what the host has."""

MIN_PAGES = 2
"""The null page and one that can be used."""

MAX_SIZE = 2**31 - 1
"""The largest page id or length."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Sizes of a paged KV cache: `num_pages` pages a layer, each of `page_size` tokens. Static and hashable.

    With data parallelism `num_pages` is what each replica has. Page 0 is the null page and counts.
    """

    num_hidden_layers: int
    """Number of layers, each with pages of its own."""
    num_pages: int
    """Pages a layer, the null page included; at least 2."""
    page_size: int
    """Tokens a page holds."""
    num_kv_heads: int
    """Number of KV heads."""
    head_dim: int
    """Size of one head's key, and of its value unless `v_head_dim` says otherwise."""
    max_sequence_length: int
    """Tokens of the longest sequence: gives the width of page tables."""
    max_seqs: int
    """Sequences that run at once: gives the height of page tables."""
    dtype: DTypeLike = jnp.bfloat16
    """Type of the stored keys and values; int8, float8_e4m3fn, float8_e5m2 and int4 bring their scales."""
    v_head_dim: int | None = None
    """Size of one head's value; `None` means `head_dim`."""
    latent: bool = False
    """Whether a value is the start of its key, and stored once (multi-head latent attention)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))  # one spelling, so that equal configs hash alike
        sizes = {name: getattr(self, name) for name in _SIZES}
        _check_sizes(sizes if self.v_head_dim is None else sizes | {"v_head_dim": self.v_head_dim})
        if self.num_pages < MIN_PAGES:
            raise ValueError(
                f"num_pages={self.num_pages} must be at least {MIN_PAGES}: page 0 is the null page, never handed out"
            )
        KVLayout.create(self.head_dim, self.dtype, v_head_dim=self.v_head_dim, latent=self.latent)  # refuses the dtype

    @property
    def pages_per_seq(self) -> int:
        """Pages of the longest sequence, the width of a page table."""
        return -(-self.max_sequence_length // self.page_size)

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page over all layers: keys, values and scales of all heads, padding of the rows included."""
        one_layer = KVPages.bytes_per_page(
            self.page_size,
            self.num_kv_heads,
            self.head_dim,
            self.dtype,
            v_head_dim=self.v_head_dim,
            latent=self.latent,
        )
        return one_layer * self.num_hidden_layers

    @property
    def total_bytes(self) -> int:
        """Bytes of all pages of all layers."""
        return self.num_pages * self.bytes_per_page

    @property
    def max_sequences(self) -> int:
        """The seed's word for `max_sequence_length`."""
        return self.max_sequence_length

    @property
    def kv_head_dim_size(self) -> int:
        """The seed's word for `head_dim`."""
        return self.head_dim

    @property
    def num_pages_per_layer(self) -> int:
        """The seed's word for `num_pages`."""
        return self.num_pages

    @classmethod
    def create(  # noqa: PLR0917 - the seed's signature
        cls,
        mesh: Mesh | None,
        batch_size: int,
        num_hidden_layers: int,
        max_sequences: int,
        page_size: int,
        num_kv_heads: int,
        kv_head_dim_size: int,
        hbm_utilization: float = 0.9,
        num_pages: int | None = None,
        *,
        dtype: DTypeLike = jnp.bfloat16,
        v_head_dim: int | None = None,
        latent: bool = False,
        byte_budget: int | None = None,
        partition_manager: PartitionManager | None = None,
    ) -> Self:
        """A config with as many pages as asked for, or as fit.

        `num_pages` if given; else what fits into `byte_budget` bytes of each device; else what fits into each
        device's memory: `bytes_limit * hbm_utilization - bytes_in_use`. A device holds all heads of a page, or its
        part where heads are split over the mesh. Where devices do not report their memory (CPU), an eighth of the
        host's memory times `hbm_utilization` is shared by the mesh's devices, and no more is taken than `batch_size`
        sequences of full length need. On a mesh over many processes all of them call this, and get what fits into the
        one with the least.

        Args:
            mesh: the devices that share the cache; `None` for the default one.
            batch_size: sequences that run at once.
            num_hidden_layers: number of layers.
            max_sequences: the seed's word for the tokens of the longest sequence.
            page_size: tokens a page holds.
            num_kv_heads: number of KV heads.
            kv_head_dim_size: size of one head's key, and of its value unless `v_head_dim` says otherwise.
            hbm_utilization: share of a device's memory to fill, with what is in use already; in (0, 1].
            num_pages: pages a layer, the null page included.
            dtype: type of the stored keys and values, with scales or without.
            v_head_dim: size of one head's value; `None` means that of its key.
            latent: whether a value is the start of its key, and stored once.
            byte_budget: bytes of each device for the pages of all layers.
            partition_manager: names the mesh axis that heads are split over; as for `init_cache`.

        Raises:
            ValueError: a size is below 1, `num_pages` and `byte_budget` are both given, or memory does not hold even
                the null page and one more.
        """
        if num_pages is not None and byte_budget is not None:
            raise ValueError(f"num_pages={num_pages} and byte_budget={byte_budget} both set the size; give one of them")
        if not 0 < hbm_utilization <= 1:
            raise ValueError(f"hbm_utilization={hbm_utilization} must lie in (0, 1], such as 0.9")
        smallest = cls(
            num_hidden_layers=num_hidden_layers,
            num_pages=MIN_PAGES if num_pages is None else num_pages,
            page_size=page_size,
            num_kv_heads=num_kv_heads,
            head_dim=kv_head_dim_size,
            max_sequence_length=max_sequences,
            max_seqs=batch_size,
            dtype=dtype,
            v_head_dim=v_head_dim,
            latent=latent,
        )
        if num_pages is not None:
            return smallest
        split = 1 if mesh is None else axis_size(mesh, kv_head_axis(mesh, num_kv_heads, partition_manager))
        fitting = _fitting_pages(smallest, mesh, split, hbm_utilization, byte_budget)
        return dataclasses.replace(smallest, num_pages=fitting)


_SIZES = (
    "num_hidden_layers",
    "num_pages",
    "page_size",
    "num_kv_heads",
    "head_dim",
    "max_sequence_length",
    "max_seqs",
)


def _check_sizes(sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int | np.integer):
            raise ValueError(f"{name}={size!r} must be a whole number")
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")
        if size > MAX_SIZE:
            raise ValueError(f"{name}={size} must be at most {MAX_SIZE}: page ids and lengths are int32")


def _fitting_pages(
    config: CacheConfig, mesh: Mesh | None, split: int, utilization: float, byte_budget: int | None
) -> int:
    """Pages that fit into each device, which holds `1 / split` of every page."""
    most = None
    if byte_budget is not None:
        available, source = byte_budget, "byte_budget"
    elif (available := _device_bytes(mesh, utilization)) is not None:
        source = f"device memory at hbm_utilization={utilization}, less what is in use"
    else:
        available, source = _host_bytes(mesh, utilization), "the share of host memory"
        most = max(MIN_PAGES, config.max_seqs * config.pages_per_seq + 1)
    available = _least_of_processes(available, mesh)
    per_device = config.bytes_per_page // split
    pages = available // per_device
    if pages < MIN_PAGES:
        raise ValueError(
            f"no page fits: the null page and one more need {MIN_PAGES * per_device:,} bytes a device, but "
            f"{max(0, available):,} are available ({source}); "
            "use a smaller page_size, raise the budget, or split heads over more devices"
        )
    return pages if most is None else min(pages, most)


def _least_of_processes(number: int, mesh: Mesh | None) -> int:
    """The least of what all processes of the mesh say, which have to allocate alike; each of them must call this."""
    if mesh is None or len(mesh.local_devices) == mesh.size:
        return number
    mine = np.frombuffer(np.int64(number).tobytes(), np.uint8)[None]  # as bytes: jax has no int64 by default
    per_device = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    each = jax.make_array_from_callback((mesh.size, 8), per_device, lambda _: mine)
    everywhere = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))(each)
    return int(np.asarray(everywhere).view(np.int64).min())


def _devices(mesh: Mesh | None) -> list[Any]:
    """This process's devices of the mesh; the default one without a mesh."""
    return jax.local_devices()[:1] if mesh is None else list(mesh.local_devices)


def _device_bytes(mesh: Mesh | None, utilization: float) -> int | None:
    """Bytes that the fullest device still has for pages; `None` where devices do not report their memory."""
    stats = [device.memory_stats() for device in _devices(mesh)]
    if not all(one and "bytes_limit" in one for one in stats):
        return None
    return min(int(one["bytes_limit"] * utilization) - one.get("bytes_in_use", 0) for one in stats)


def _host_bytes(mesh: Mesh | None, utilization: float) -> int:
    """Each device's part of `HOST_MEMORY_FRACTION` of the host's memory."""
    names = getattr(os, "sysconf_names", {})  # Windows has none
    if "SC_PHYS_PAGES" not in names or "SC_PAGE_SIZE" not in names:
        raise ValueError(
            "neither the devices nor the operating system report their memory, so the page count cannot be derived; "
            "give num_pages or byte_budget"
        )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(memory * HOST_MEMORY_FRACTION * utilization) // len(_devices(mesh))


PagedAttentionCacheMetaData = CacheConfig
"""The seed's name."""
