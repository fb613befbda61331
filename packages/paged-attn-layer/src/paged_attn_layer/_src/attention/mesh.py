"""Which devices a call is split over: the one rule that every path follows."""

import dataclasses
import math
import warnings
from typing import cast

import jax
from eformer.escale import PartitionManager, get_incontext_mesh
from jax.sharding import AbstractMesh, AxisType, Mesh

from paged_cache import PagedAttentionCacheView, kv_head_axis
from paged_cache import PartitionManager as LayerTwoManager

AnyMesh = Mesh | AbstractMesh


def on_mesh(
    view: PagedAttentionCacheView, mesh: AnyMesh | None = None, partition_manager: PartitionManager | None = None
) -> PagedAttentionCacheView:
    """Returns the view split over the call's mesh: as it was split before, else by KV heads.

    So pages of a single device work on any mesh. If the mesh axis does not divide the KV heads, every device has all.

    Args:
        view: one layer's pages.
        mesh: the mesh asked for; `None` takes the context's, else the view's.
        partition_manager: names the mesh axis of the heads; `None` means `"tp"`.

    Raises:
        ValueError: the mesh is not the one that the view's pages lie on.
    """
    resolved = resolve_mesh(mesh, view.mesh)
    if resolved is None:
        return view
    concrete = cast(Mesh, resolved)  # or an AbstractMesh within jax.jit, where one will do
    if view.mesh is not None:
        return dataclasses.replace(view, mesh=concrete)
    manager = cast(LayerTwoManager | None, partition_manager)  # eformer types its modes more narrowly than str
    return dataclasses.replace(view, mesh=concrete, head_axis=kv_head_axis(concrete, view.pages.num_kv_heads, manager))


def query_axis(view: PagedAttentionCacheView, q_heads: int) -> str | tuple[str, ...] | None:
    """Returns the mesh axis over which query heads are split: that of their KV heads.

    Query heads that all share one KV head are split over `"tp"`, if it divides them. Each device has the pages whole.
    """
    if view.mesh is None or view.head_axis is not None or view.pages.num_kv_heads > 1:
        return view.head_axis
    return kv_head_axis(view.mesh, q_heads)


def axis_size(mesh: AnyMesh, axis: str | tuple[str, ...] | None) -> int:
    """Returns the number of parts that an axis, or several together, splits into; 1 for `None`."""
    names = (axis,) if isinstance(axis, str) else (axis or ())
    return math.prod(mesh.shape[name] for name in names)


def resolve_mesh(given: AnyMesh | None, view_mesh: AnyMesh | None) -> AnyMesh | None:
    """Returns the mesh of a call: the one given, else the context's, else the view's.

    `None` means that there is none: a plain call, on the device where the arrays lie.

    Raises:
        ValueError: it is not the mesh that the view's pages lie on.
    """
    chosen = context_mesh() if given is None else given
    if chosen is None or view_mesh is None:
        return view_mesh if chosen is None else chosen
    if not _same_devices(chosen, view_mesh):
        raise ValueError(
            f"mesh {_describe(chosen)} must be the one that the cache view's pages lie on, {_describe(view_mesh)}; "
            "give PagedAttentionCache.init_cache the mesh that the model runs on"
        )
    return chosen


def context_mesh() -> AnyMesh | None:
    """The mesh of the enclosing `jax.set_mesh` or, in older code, `with mesh:`; `None` outside both.

    Inside a caller's own `jax.shard_map` the arrays are one device's already, so there is none either.
    """
    abstract = jax.sharding.get_abstract_mesh()
    if abstract.empty:
        return _older_context_mesh()
    if AxisType.Manual in abstract.axis_types:
        return None
    try:
        mesh = jax.sharding.get_mesh()  # with its devices, which eager calls need
    except ValueError:  # within jax.jit
        return abstract
    return abstract if mesh.empty else mesh


def platform_of(mesh: AnyMesh | None) -> str:
    """The platform of a mesh's devices; without a mesh, that of the device that jax puts arrays on."""
    if isinstance(mesh, Mesh):
        return mesh.devices.flat[0].platform
    if mesh is not None and mesh.abstract_device is not None:
        return mesh.abstract_device.platform
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def _older_context_mesh() -> Mesh | None:
    with warnings.catch_warnings():  # jax warns whoever reads this context that it will end
        warnings.simplefilter("ignore", DeprecationWarning)
        mesh = get_incontext_mesh(raise_error=False)
    return None if mesh.empty else mesh


def _same_devices(a: AnyMesh, b: AnyMesh) -> bool:
    if dict(a.shape) != dict(b.shape):
        return False
    if isinstance(a, Mesh) and isinstance(b, Mesh):
        return list(a.devices.flat) == list(b.devices.flat)
    return True  # within jax.jit the context's mesh has no devices yet


def _describe(mesh: AnyMesh) -> str:
    sizes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    devices = f" of devices {[device.id for device in mesh.devices.flat]}" if isinstance(mesh, Mesh) else ""
    return f"({sizes}){devices}"
