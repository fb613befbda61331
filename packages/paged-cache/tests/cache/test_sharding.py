import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from paged_cache import kv_head_axis
from paged_cache._src.cache.sharding import axis_size, sharded_call


class Manager:
    """A partition manager that answers every question with one axis."""

    def __init__(self, axis):
        self.axis = axis

    def resolve(self, axes, mode):
        assert axes == ["__HEAD__", "_", "_", "_"]
        assert mode == "__prefill__"
        return PartitionSpec() if self.axis == "nothing" else PartitionSpec(self.axis, None, None, None)


def mesh_of(kind=AxisType.Auto, **sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))


@pytest.mark.parametrize(
    ("heads", "manager", "expected"),
    [
        (4, None, "tp"),
        (6, None, None),  # 6 heads on 4 devices are replicated
        (1, None, None),
        (4, Manager("tp"), "tp"),
        (4, Manager("dp"), "dp"),
        (4, Manager(None), None),
        (4, Manager("nothing"), None),
        (4, Manager("fsdp"), None),  # the mesh has no such axis
        (4, Manager(("fsdp", "tp")), "tp"),
        (8, Manager(("dp", "tp")), ("dp", "tp")),
        (4, Manager(("dp", "tp")), None),
    ],
)
def test_kv_head_axis(heads, manager, expected):
    assert kv_head_axis(mesh_of(dp=2, tp=4), heads, manager) == expected


def test_kv_head_axis_without_a_mesh_or_without_tp():
    assert kv_head_axis(None, 4) is None
    assert kv_head_axis(mesh_of(dp=8), 8) is None
    assert kv_head_axis(mesh_of(tp=1), 5) == "tp"


@pytest.mark.parametrize(("axis", "size"), [(None, 1), ("dp", 2), ("tp", 4), (("dp", "tp"), 8), ((), 1)])
def test_axis_size(axis, size):
    assert axis_size(mesh_of(dp=2, tp=4), axis) == size


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("where", ["anywhere", "split"])
def test_sharded_call_places_its_arguments(kind, jitted, where):
    mesh, spec = mesh_of(kind, tp=4), PartitionSpec("tp")
    x = jnp.arange(8.0)
    if where == "split":
        x = jax.device_put(x, NamedSharding(mesh, spec))

    def run(x):
        def part(x, y):
            return x + y["n"] + x.shape[0]

        return sharded_call(part, mesh, (spec, PartitionSpec()), spec, x, {"n": jnp.float32(1)})

    out = (jax.jit(run) if jitted else run)(x)
    assert out.sharding.spec[0] == "tp"
    np.testing.assert_array_equal(out, np.arange(8.0) + 3)


def test_sharded_call_takes_an_array_that_is_committed_to_one_device():
    x = jax.device_put(jnp.arange(8.0), jax.devices()[3])
    out = sharded_call(lambda x: -x, mesh_of(tp=4), (PartitionSpec("tp"),), PartitionSpec("tp"), x)
    np.testing.assert_array_equal(out, -np.arange(8.0))
