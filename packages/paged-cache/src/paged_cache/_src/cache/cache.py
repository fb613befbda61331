"""The pages of all layers, in views."""

import dataclasses
from collections.abc import Sequence
from typing import Self

import jax
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from paged_cache._src.cache.config import CacheConfig
from paged_cache._src.cache.fitting import check_num_pages
from paged_cache._src.cache.sharding import MeshAxis, PartitionManager, axis_size, kv_head_axis
from paged_cache._src.cache.view import PagedAttentionCacheView
from paged_cache._src.manager.groups import KVShape
from paged_kernels import KVPages


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedAttentionCache:
    """The pages of all layers: one view a layer, or views that several layers share (`CacheSpec.places`).

    A pytree: pass it through `jax.jit`, and donate it so that writes happen in place.
    """

    views: tuple[PagedAttentionCacheView, ...]

    def check_not_donated(self) -> None:
        """Check that the pages can still be used. Traced arrays are not checked.

        Raises:
            ValueError: they were donated to an earlier call.
        """
        for index, view in enumerate(self.views):
            view.pages.check_not_donated(f"cache.views[{index}].pages")

    @classmethod
    def init_cache(
        cls,
        mesh: Mesh | None,
        dtype: DTypeLike | None,
        metadata: CacheConfig,
        partition_manager: PartitionManager | None,
        quantizer: None = None,
        *,
        data_axis: str | None = None,
    ) -> Self:
        """A cache of zeros, allocated where it will stay: each device makes its own part, the host none.

        Args:
            mesh: the devices that share the cache; `None` for the default one.
            dtype: type of the stored keys and values, where a view's shape names none; `None` for the config's, by
                which it was sized. With a type that needs scales (int8, float8_e4m3fn, float8_e5m2, int4) a write
                quantises.
            metadata: the sizes.
            partition_manager: names the mesh axis that heads are split over; `None` means `"tp"` if the mesh has it.
                Each view has its own heads; those that the axis does not divide are replicated.
            quantizer: must be `None`; the dtype says how the cache is quantised.
            data_axis: mesh axis for data parallelism; each replica gets a pool of `metadata.num_pages` pages.

        Raises:
            ValueError: `data_axis` is not an axis of the mesh, or splits heads already, or the pages need more than all
                memory of a device.
            NotImplementedError: a quantizer is given.
        """
        if quantizer is not None:
            raise NotImplementedError(
                f"quantizer={quantizer!r} is not supported: the pages' dtype quantises, with scales by token and head; "
                'pass None, and dtype="int8" (or float8_e4m3fn, float8_e5m2, int4)'
            )
        config = metadata if dtype is None else dataclasses.replace(metadata, dtype=dtype)
        axes = [kv_head_axis(mesh, shape.num_kv_heads, partition_manager) for shape in config.views]
        for head_axis in dict.fromkeys(axes):
            _check_data_axis(mesh, head_axis, data_axis)
        check_num_pages(config.num_pages, config.bytes_per_page_on_device(mesh, partition_manager), mesh)
        pages = _allocate(config, mesh, axes, data_axis)
        views = zip(pages, axes, strict=True)
        return cls(tuple(PagedAttentionCacheView(each, mesh, head_axis, data_axis) for each, head_axis in views))


def _allocate(
    config: CacheConfig, mesh: Mesh | None, head_axes: Sequence[MeshAxis | None], data_axis: str | None
) -> list[KVPages]:
    """The pages of each view, made on the devices that hold them."""
    replicas = 1 if mesh is None else axis_size(mesh, data_axis)

    def zeros() -> list[KVPages]:
        return [_zeros(config, shape, replicas * config.num_pages) for shape in config.views]

    if mesh is None:
        return zeros()
    where = [NamedSharding(mesh, KVPages.partition_spec(head_axis, data_axis)) for head_axis in head_axes]
    return jax.jit(zeros, out_shardings=where)()


def _zeros(config: CacheConfig, shape: KVShape, num_pages: int) -> KVPages:
    return KVPages.zeros(
        num_pages,
        config.page_size,
        shape.num_kv_heads,
        shape.head_dim,
        shape.dtype or config.dtype,
        v_head_dim=shape.v_head_dim,
        latent=shape.latent,
    )


def _check_data_axis(mesh: Mesh | None, head_axis: MeshAxis | None, data_axis: str | None) -> None:
    if data_axis is None:
        return
    names = () if mesh is None else mesh.axis_names
    if data_axis not in names:
        raise ValueError(f"data_axis={data_axis!r} must be one of the mesh's axes {names}, or None")
    if data_axis in ((head_axis,) if isinstance(head_axis, str) else head_axis or ()):
        raise ValueError(f"data_axis={data_axis!r} splits KV heads already; use another axis of {names}")
