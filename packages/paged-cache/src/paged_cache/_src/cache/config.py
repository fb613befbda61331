"""The sizes of a cache."""

import dataclasses
from collections.abc import Callable
from typing import Self, TypeVar

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from paged_cache._src.cache.fitting import MIN_PAGES, check_num_pages, fitting_pages
from paged_cache._src.cache.sharding import PartitionManager, axis_size, kv_head_axis
from paged_cache._src.manager.groups import KVShape
from paged_cache._src.spec.cache_spec import CacheSpec
from paged_kernels import KVLayout, KVPages

MAX_SIZE = 2**31 - 1
"""The largest page id or length."""

Fact = TypeVar("Fact")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Sizes of a paged KV cache: each view has `num_pages` pages of `page_size` tokens. Static and hashable.

    With data parallelism `num_pages` is what each replica has. Page 0 is the null page and counts.
    """

    views: tuple[KVShape, ...]
    """What each view stores for one token (`CacheSpec.views`). Layers of other groups may use the same view."""
    num_pages: int
    """Pages of each view, the null page included; at least 2."""
    page_size: int
    """Tokens a page holds."""
    max_sequence_length: int
    """Tokens of the longest sequence: gives the width of page tables."""
    max_seqs: int
    """Sequences that run at once: gives the height of page tables."""
    dtype: DTypeLike = jnp.bfloat16
    """Type of the stored keys and values where a shape names none; int8, float8_e4m3fn, float8_e5m2 and int4 bring
    their scales."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", as_dtype(self.dtype))  # one spelling, so that equal configs hash alike
        _check_sizes({name: getattr(self, name) for name in _SIZES})
        if self.num_pages < MIN_PAGES:
            raise ValueError(
                f"num_pages={self.num_pages} must be at least {MIN_PAGES}: page 0 is the null page, never handed out"
            )
        if not self.views:
            raise ValueError("views=() must hold a KVShape for each view, at least one")
        for shape in dict.fromkeys(self.views):
            layout_of(shape, self.dtype)  # refuses types that pages cannot have

    @property
    def pages_per_seq(self) -> int:
        """Pages of the longest sequence, the width of a page table."""
        return -(-self.max_sequence_length // self.page_size)

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page in all views: keys, values and scales of all heads, with the padding."""
        return sum(bytes_per_page(shape, self.page_size, self.dtype) for shape in self.views)

    @property
    def total_bytes(self) -> int:
        """Bytes of all pages of all views."""
        return self.num_pages * self.bytes_per_page

    # What EasyDeL's metadata says of all layers at once

    @property
    def num_hidden_layers(self) -> int:
        """Number of views. Raises ValueError if they differ in shape, as all that is said of each view does."""
        return self._of_each("num_hidden_layers", lambda _: len(self.views))

    @property
    def num_kv_heads(self) -> int:
        """KV heads of each view."""
        return self._of_each("num_kv_heads", lambda shape: shape.num_kv_heads)

    @property
    def head_dim(self) -> int:
        """Size of one head's key in each view."""
        return self._of_each("head_dim", lambda shape: shape.head_dim)

    @property
    def kv_head_dim_size(self) -> int:
        """EasyDeL's name for `head_dim`."""
        return self._of_each("kv_head_dim_size", lambda shape: shape.head_dim)

    @property
    def v_head_dim(self) -> int | None:
        """Size of one head's value in each view; `None` means `head_dim`."""
        return self._of_each("v_head_dim", lambda shape: shape.v_head_dim)

    @property
    def latent(self) -> bool:
        """True if a value is the start of its key in each view."""
        return self._of_each("latent", lambda shape: shape.latent)

    @property
    def max_sequences(self) -> int:
        """EasyDeL's name for `max_sequence_length`."""
        return self.max_sequence_length

    @property
    def batch_size(self) -> int:
        """EasyDeL's name for `max_seqs`."""
        return self.max_seqs

    @property
    def num_pages_per_layer(self) -> int:
        """EasyDeL's name for `num_pages`."""
        return self.num_pages

    @classmethod
    def create(  # noqa: PLR0917 - EasyDeL's signature
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
        """The config of layers that are all alike, each with a view; EasyDeL's signature. See `for_spec`.

        Args:
            mesh: the devices that share the cache; `None` for the default one.
            batch_size: sequences that run at once.
            num_hidden_layers: number of layers.
            max_sequences: EasyDeL's name for the tokens of the longest sequence.
            page_size: tokens a page holds.
            num_kv_heads: number of KV heads.
            kv_head_dim_size: size of one head's key, and of its value unless `v_head_dim` says otherwise.
            hbm_utilization: as for `for_spec`.
            num_pages: as for `for_spec`.
            dtype: as for `for_spec`.
            v_head_dim: size of one head's value; `None` means that of its key.
            latent: whether a value is the start of its key, and stored once.
            byte_budget: as for `for_spec`.
            partition_manager: as for `for_spec`.

        Raises:
            ValueError: as for `for_spec`.
        """
        _check_sizes({"num_hidden_layers": num_hidden_layers})
        kv = KVShape(num_kv_heads=num_kv_heads, head_dim=kv_head_dim_size, v_head_dim=v_head_dim, latent=latent)
        return cls.for_spec(
            CacheSpec.uniform(num_hidden_layers, kv),
            mesh,
            max_seqs=batch_size,
            max_sequence_length=max_sequences,
            page_size=page_size,
            num_pages=num_pages,
            byte_budget=byte_budget,
            hbm_utilization=hbm_utilization,
            dtype=dtype,
            partition_manager=partition_manager,
        )

    @classmethod
    def for_spec(
        cls,
        spec: CacheSpec,
        mesh: Mesh | None = None,
        *,
        max_seqs: int,
        max_sequence_length: int,
        page_size: int,
        num_pages: int | None = None,
        byte_budget: int | None = None,
        hbm_utilization: float = 0.9,
        dtype: DTypeLike = jnp.bfloat16,
        partition_manager: PartitionManager | None = None,
    ) -> Self:
        """The config of a cache for a model's layers, with as many pages as asked for, or as fit.

        `num_pages` if given; else what fits into `byte_budget` bytes of each device; else what fits into each
        device's memory: `bytes_limit * hbm_utilization - bytes_in_use`. A device holds all heads of a page, or its
        part where heads are split over the mesh. Where devices do not report their memory (CPU), an eighth of the
        host's memory times `hbm_utilization` is shared by the mesh's devices, and no more is taken than `max_seqs`
        sequences of full length need. On a mesh over many processes all of them call this, and get what fits into the
        one with the least.

        Args:
            spec: what the model's layers need.
            mesh: the devices that share the cache; `None` for the default one.
            max_seqs: sequences that run at once.
            max_sequence_length: tokens of the longest sequence.
            page_size: tokens a page holds.
            num_pages: pages of each view, the null page included.
            byte_budget: bytes of each device for the pages of all views.
            hbm_utilization: share of a device's memory to fill, with what is in use already; in (0, 1].
            dtype: type of the stored keys and values where a shape names none, with scales or without.
            partition_manager: names the mesh axis that heads are split over; as for `init_cache`.

        Raises:
            ValueError: a size is below 1, `num_pages` and `byte_budget` are both given, `num_pages` need more than all
                memory of a device, or memory does not hold even the null page and one more.
        """
        if num_pages is not None and byte_budget is not None:
            raise ValueError(f"num_pages={num_pages} and byte_budget={byte_budget} both set the size; give one of them")
        if not 0 < hbm_utilization <= 1:
            raise ValueError(f"hbm_utilization={hbm_utilization} must lie in (0, 1], such as 0.9")
        smallest = cls(
            views=spec.views(),
            num_pages=MIN_PAGES if num_pages is None else num_pages,
            page_size=page_size,
            max_sequence_length=max_sequence_length,
            max_seqs=max_seqs,
            dtype=dtype,
        )
        on_device = smallest.bytes_per_page_on_device(mesh, partition_manager)
        if num_pages is not None:
            check_num_pages(num_pages, on_device, mesh)
            return smallest
        of_use = 1 + max_seqs * len(spec.pool_groups()) * smallest.pages_per_seq
        fitting = fitting_pages(on_device, of_use, mesh, hbm_utilization, byte_budget)
        return dataclasses.replace(smallest, num_pages=fitting)

    def bytes_per_page_on_device(self, mesh: Mesh | None, partition_manager: PartitionManager | None) -> int:
        """Bytes of one page on each device, which holds all heads of a view, or its part."""

        def on_device(shape: KVShape) -> int:
            axis = kv_head_axis(mesh, shape.num_kv_heads, partition_manager)
            parts = 1 if mesh is None else axis_size(mesh, axis)
            return bytes_per_page(shape, self.page_size, self.dtype) // parts

        return sum(map(on_device, self.views))

    def _of_each(self, name: str, fact: Callable[[KVShape], Fact]) -> Fact:
        """What is true of every view, if all are alike."""
        first, *others = dict.fromkeys(self.views)
        if others:
            raise ValueError(
                f"{name} is asked of a cache whose views differ: {first} and {others[0]}; read it from each of views"
            )
        return fact(first)


def layout_of(shape: KVShape, dtype: DTypeLike) -> KVLayout:
    """How pages store the entries of a shape, in a cache of type `dtype`."""
    return KVLayout.create(shape.head_dim, shape.dtype or dtype, v_head_dim=shape.v_head_dim, latent=shape.latent)


def as_dtype(dtype: DTypeLike) -> np.dtype:
    """The type that this names.

    Raises:
        ValueError: it names none.
    """
    try:
        return jnp.dtype(dtype)
    except TypeError:
        raise ValueError(f"dtype={dtype!r} must be a type that pages can have, such as 'bfloat16'") from None


def bytes_per_page(shape: KVShape, page_size: int, dtype: DTypeLike) -> int:
    """Bytes of one page of a view of this shape, in a cache of type `dtype`."""
    return KVPages.bytes_per_page(
        page_size,
        shape.num_kv_heads,
        shape.head_dim,
        shape.dtype or dtype,
        v_head_dim=shape.v_head_dim,
        latent=shape.latent,
    )


_SIZES = ("num_pages", "page_size", "max_sequence_length", "max_seqs")


def _check_sizes(sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int | np.integer):
            raise ValueError(f"{name}={size!r} must be a whole number")
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")
        if size > MAX_SIZE:
            raise ValueError(f"{name}={size} must be at most {MAX_SIZE}: page ids and lengths are int32")


PagedAttentionCacheMetaData = CacheConfig
"""EasyDeL's name for `CacheConfig`."""
