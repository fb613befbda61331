import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from paged_attn_layer._src.attention.mesh import context_mesh, platform_of, resolve_mesh


def mesh_of(first, count=2):
    return Mesh(np.array(jax.devices()[first : first + count]), ("tp",))


GIVEN, CONTEXT, VIEW = mesh_of(0), mesh_of(2), mesh_of(4)


def test_without_any_mesh_there_is_none():
    assert resolve_mesh(None, None) is None


def test_the_view_gives_the_mesh_where_nothing_else_does():
    assert resolve_mesh(None, VIEW) is VIEW


def test_the_context_comes_before_no_mesh_and_the_given_before_the_context():
    with jax.set_mesh(CONTEXT):
        assert resolve_mesh(None, None) == CONTEXT
        assert resolve_mesh(GIVEN, None) is GIVEN


@pytest.mark.filterwarnings("ignore:.*context manager has been deprecated:DeprecationWarning")
def test_the_older_context_counts_alike():
    with CONTEXT:
        assert resolve_mesh(None, None) == CONTEXT
        assert resolve_mesh(GIVEN, None) is GIVEN
    assert context_mesh() is None


@pytest.mark.filterwarnings("ignore:.*context manager has been deprecated:DeprecationWarning")
def test_the_older_context_is_seen_within_jit():
    seen = []
    with CONTEXT:
        jax.jit(lambda x: seen.append(context_mesh()) or x)(1)
    assert seen == [CONTEXT]


def test_the_context_within_jit_is_the_abstract_mesh():
    seen = []
    with jax.set_mesh(CONTEXT):
        jax.jit(lambda x: seen.append(resolve_mesh(None, CONTEXT)) or x)(1)
    assert seen == [CONTEXT.abstract_mesh]


def test_inside_a_shard_map_there_is_no_context_mesh():
    seen = []
    spec = PartitionSpec("tp")
    jax.shard_map(lambda x: seen.append(context_mesh()) or x, mesh=CONTEXT, in_specs=spec, out_specs=spec)(np.ones(2))
    assert seen == [None]


def test_a_mesh_other_than_that_of_the_pages_is_refused():
    with pytest.raises(ValueError, match=r"mesh \(tp=2\) of devices \[0, 1\] must be the one .* \[4, 5\]; give Paged"):
        resolve_mesh(GIVEN, VIEW)
    with jax.set_mesh(mesh_of(0, 4)), pytest.raises(ValueError, match=r"\(tp=4\)"):
        resolve_mesh(None, VIEW)


def test_platform_is_that_of_the_mesh_or_of_the_default_device():
    assert platform_of(GIVEN) == "cpu"
    assert platform_of(GIVEN.abstract_mesh) == "cpu"
    assert platform_of(AbstractMesh((2,), ("tp",))) == "cpu"
    assert platform_of(None) == "cpu"
    with jax.default_device(jax.devices()[1]):
        assert platform_of(None) == "cpu"
    with jax.default_device("cpu"):
        assert platform_of(None) == "cpu"
