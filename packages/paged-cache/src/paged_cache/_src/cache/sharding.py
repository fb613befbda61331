"""How a cache is split over a mesh: the rule for KV heads, and the way to run a function on each device's part."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MeshAxis = str | tuple[str, ...]
"""One mesh axis, or several that together split one array axis."""

DEFAULT_HEAD_AXIS = "tp"
"""The mesh axis over which heads are split when no partition manager says otherwise."""

# eformer's names for array axes and modes. They are plain strings, so eformer, which belongs to the layer above, need
# not be imported here.
HEAD = "__HEAD__"
EMPTY = "_"
MODE_PREFILL = "__prefill__"

Result = TypeVar("Result")


class PartitionManager(Protocol):
    """What this package needs of a partition manager, such as eformer's: the mesh axes of named array axes."""

    def resolve(self, axes: Sequence[str], mode: str) -> PartitionSpec:
        """The mesh axes that split array axes of these names."""
        ...


def axis_size(mesh: Mesh, axis: MeshAxis | None) -> int:
    """The number of parts that `axis` splits into: the product of its sizes; 1 for `None`."""
    names = (axis,) if isinstance(axis, str) else (axis or ())
    return math.prod(mesh.shape[name] for name in names)


def kv_head_axis(
    mesh: Mesh | None, num_kv_heads: int, partition_manager: PartitionManager | None = None
) -> MeshAxis | None:
    """The mesh axis that KV heads are split over; `None` if every device holds all of them.

    It is the partition manager's axis for heads; `"tp"` without a manager. Axes that the mesh does not have do not
    split. Heads that the axis does not divide are replicated, not refused, because a partition manager does not know
    their number.
    """
    if mesh is None:
        return None
    names = tuple(name for name in _wanted_axes(partition_manager) if name in mesh.shape)
    parts = axis_size(mesh, names)
    if not names or parts * kv_heads_per_device(num_kv_heads, parts) != num_kv_heads:
        return None
    return names[0] if len(names) == 1 else names


def kv_heads_per_device(num_kv_heads: int, parts: int) -> int:
    """KV heads that each of `parts` devices holds: its part, or all of them if `parts` does not divide them.

    >>> kv_heads_per_device(8, 4), kv_heads_per_device(8, 3)
    (2, 8)
    """
    return num_kv_heads if num_kv_heads % parts else num_kv_heads // parts


def _wanted_axes(partition_manager: PartitionManager | None) -> tuple[str, ...]:
    if partition_manager is None:
        return (DEFAULT_HEAD_AXIS,)
    spec = partition_manager.resolve(axes=[HEAD, EMPTY, EMPTY, EMPTY], mode=MODE_PREFILL)
    axis = spec[0] if len(spec) else None
    return (axis,) if isinstance(axis, str) else tuple(axis or ())


def sharded_call(
    function: Callable[..., Result],
    mesh: Mesh,
    in_specs: tuple[Any, ...],  # for each argument a PartitionSpec, or a pytree of them like the argument
    out_specs: Any,  # a PartitionSpec, or a pytree of them like the result
    *args: Any,
) -> Result:
    """`function(*args)` on each device's part of the arguments: `jax.shard_map` that also places them.

    A spec serves every leaf under it. The arguments are placed first, so the call also works in eager code, with arrays
    of one device, and on a mesh with Explicit axes (the default of `jax.make_mesh`). There `jax.shard_map` alone
    refuses arrays that are not split yet. An argument that is in place is not moved.
    """
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), in_specs)
    placed = [jax.device_put(arg, where) for arg, where in zip(args, shardings, strict=True)]
    # The kernels' outputs carry no replication types, so shard_map cannot check them.
    mapped = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return mapped(*placed)
