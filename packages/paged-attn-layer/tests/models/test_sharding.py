import jax
import numpy as np
from eformer.escale import PartitionAxis, PartitionManager
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from paged_attn_layer._src.models.sharding import expert_axes, head_axes, partition_spec

SHARDINGS = (("a.{n}.kernel", ("wide", None)), ("a.{n}.{x|y}", (None, "narrow")))
SIZES = {"wide": 6, "narrow": 3}


def spec(path, devices):
    return partition_spec(path, SHARDINGS, SIZES, Mesh(np.array(jax.devices()[:devices]), ("tp",)))


def test_an_axis_is_split_if_the_mesh_divides_it():
    assert spec("a.7.kernel", 2) == spec("a.7.kernel", 3) == P("tp", None)
    assert (spec("a.0.y", 3), spec("a.0.y", 2)) == (P(None, "tp"), P(None, None))


def test_a_weight_in_no_template_is_whole_everywhere():
    assert spec("a.0.z", 2) == P()


EXPERTS = (("up", ("experts", None, "mlp")),)


def spec_of_experts(sizes, names, manager=None):
    mesh = Mesh(np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes), names)
    return partition_spec("up", EXPERTS, {"experts": 8, "mlp": 6}, mesh, manager)


def test_experts_have_a_mesh_axis_of_their_own():
    assert spec_of_experts((2, 2), ("ep", "tp")) == P("ep", None, "tp")
    assert spec_of_experts((2,), ("tp",)) == P(None, None, "tp")
    assert spec_of_experts((3,), ("ep",)) == P(None, None, None)  # 8 experts


def test_the_partition_manager_names_it():
    manager = PartitionManager(PartitionAxis(expert_axis=("x", "y"), head_axis="y"))
    assert (expert_axes(manager), head_axes(manager)) == (("x", "y"), ("y",))
    assert spec_of_experts((2, 1), ("x", "y"), manager) == P(("x", "y"), None, None), (
        "no axis splits two axes of a weight"
    )
    # no axis splits two axes of a weight
    both = PartitionManager(PartitionAxis(expert_axis="tp"))
    assert spec_of_experts((2,), ("tp",), both) == P("tp", None, None)
