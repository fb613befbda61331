"""From page managers to the pages of a cache on a mesh, and back: what was written is read and attended exactly."""

import pytest
from filled_cache import mesh_of
from jax.sharding import AxisType
from serving_loop import ServingLoop


def serve(loop):
    for running in loop.lives():
        loop.check(running, loop.step(running))
    for manager in loop.managers:
        stats = manager.stats()
        assert min(stats.copies, stats.evictions, stats.swapped_in, stats.cached_tokens) > 0


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("heads", [4, 3])
def test_split_and_replicated_heads(kind, heads):
    loop = ServingLoop(mesh_of(kind, tp=2), heads)
    shard = loop.cache.views[0].pages.data.addressable_shards[0].data
    assert shard.shape[1] == {4: 2, 3: 3}[heads]
    serve(loop)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_each_replica_has_a_manager(kind):
    loop = ServingLoop(mesh_of(kind, dp=2, tp=2), data_axis="dp")
    assert len(loop.managers) == 2
    serve(loop)
