"""How a model's weights are split over a mesh."""

from collections.abc import Mapping, Sequence

from jax.sharding import Mesh, PartitionSpec

from paged_attn_layer._src.convert.templates import parse
from paged_cache import PartitionManager, kv_head_axis

AxisNames = tuple[str | None, ...]


def partition_spec(
    path: str,
    shardings: Sequence[tuple[str, AxisNames]],
    axis_sizes: Mapping[str, int],
    mesh: Mesh,
    partition_manager: PartitionManager | None = None,
) -> PartitionSpec:
    """How the weight at `path` is split: each of its named axes over the tensor-parallel axis of the mesh.

    An axis whose size the mesh axis does not divide is whole on every device.

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
        partition_manager: names the mesh axis to split over; `None` means `"tp"`.
    """
    for template, axes in shardings:
        if parse(template, path) is not None:
            # The rule by which the cache splits KV heads, so that weights and pages are split alike.
            return PartitionSpec(*(axis and kv_head_axis(mesh, axis_sizes[axis], partition_manager) for axis in axes))
    return PartitionSpec()
