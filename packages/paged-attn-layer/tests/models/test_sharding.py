import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from paged_attn_layer._src.models.sharding import partition_spec

SHARDINGS = (("a.{n}.kernel", ("wide", None)), ("a.{n}.{x|y}", (None, "narrow")))
SIZES = {"wide": 6, "narrow": 3}


def spec(path, devices):
    return partition_spec(path, SHARDINGS, SIZES, Mesh(np.array(jax.devices()[:devices]), ("tp",)))


def test_an_axis_is_split_if_the_mesh_divides_it():
    assert spec("a.7.kernel", 2) == spec("a.7.kernel", 3) == P("tp", None)
    assert (spec("a.0.y", 3), spec("a.0.y", 2)) == (P(None, "tp"), P(None, None))


def test_a_weight_in_no_template_is_whole_everywhere():
    assert spec("a.0.z", 2) == P()
