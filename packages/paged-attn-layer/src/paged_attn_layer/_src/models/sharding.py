"""How a model's weights are split over a mesh."""

import math
from collections.abc import Mapping, Sequence

from eformer.common_types import EMPTY, EXPERT, HEAD, MODE_PREFILL
from jax.sharding import Mesh, PartitionSpec

from paged_attn_layer._src.convert.templates import parse
from paged_cache import PartitionManager, kv_head_axis

AxisNames = tuple[str | None, ...]
MeshAxis = str | tuple[str, ...]
EXPERTS = "experts"
"""The name of axes that are split over the mesh axis for experts; all others go over the tensor-parallel axis."""


def partition_spec(
    path: str,
    shardings: Sequence[tuple[str, AxisNames]],
    axis_sizes: Mapping[str, int],
    mesh: Mesh,
    partition_manager: PartitionManager | None = None,
) -> PartitionSpec:
    """How the weight at `path` is split: each of its named axes over the tensor-parallel axis, or that for experts.

    An axis whose size the mesh axis does not divide is whole on every device. So is one whose mesh axis splits another
    axis of the weight already.

    >>> import jax
    >>> shardings = (("layers.{layer}.mlp.down_proj.kernel", ("mlp", None)),)
    >>> mesh = jax.make_mesh((1,), ("tp",))
    >>> tuple(partition_spec("layers.0.mlp.down_proj.kernel", shardings, {"mlp": 96}, mesh))
    ('tp', None)

    Args:
        path: of the weight in the model.
        shardings: templates of paths, each with the names of the weight's axes.
        axis_sizes: how many parts each named axis may be cut into.
        mesh: the devices.
        partition_manager: names the mesh axes to split over; `None` means `"tp"`, and `"ep"` for experts.
    """
    for template, axes in shardings:
        if parse(template, path) is not None:
            split = [_mesh_axis(axis, axis_sizes, mesh, partition_manager) for axis in axes]
            return PartitionSpec(*_without_repeats(split))
    return PartitionSpec()


def head_axes(partition_manager: PartitionManager | None = None) -> tuple[str, ...]:
    """The mesh axes of tensor parallelism."""
    return _axes(HEAD, "tp", partition_manager)


def expert_axes(partition_manager: PartitionManager | None = None) -> tuple[str, ...]:
    """The mesh axes over which experts are split."""
    return _axes(EXPERT, "ep", partition_manager)


def _axes(name: str, default: str, manager: PartitionManager | None) -> tuple[str, ...]:
    spec = [default] if manager is None else manager.resolve(axes=[name, EMPTY, EMPTY], mode=MODE_PREFILL)
    axis = spec[0] if len(spec) else None
    return (axis,) if isinstance(axis, str) else tuple(axis or ())


def _without_repeats(split: Sequence[MeshAxis | None]) -> list[MeshAxis | None]:
    """The same, `None` for each that names a mesh axis that one before it names."""
    used: set[str] = set()
    kept = []
    for axis in split:
        names = {axis} if isinstance(axis, str) else set(axis or ())
        kept.append(None if names & used else axis)
        used |= names
    return kept


def _mesh_axis(
    axis: str | None, sizes: Mapping[str, int], mesh: Mesh, manager: PartitionManager | None
) -> MeshAxis | None:
    if axis is None:
        return None
    if axis != EXPERTS:  # the rule by which the cache splits KV heads, so that weights and pages are split alike
        return kv_head_axis(mesh, sizes[axis], manager)
    names = tuple(name for name in expert_axes(manager) if name in mesh.shape)
    if not names or sizes[axis] % math.prod(mesh.shape[name] for name in names):
        return None
    return names[0] if len(names) == 1 else names
