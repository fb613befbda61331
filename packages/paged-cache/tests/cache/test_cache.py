import dataclasses
import gc

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from paged_cache import CacheConfig, KVShape, PagedAttentionCache

CONFIG = CacheConfig(
    views=(KVShape(num_kv_heads=4, head_dim=8),) * 3,
    num_pages=6,
    page_size=4,
    max_sequence_length=20,
    max_seqs=2,
    dtype="float32",
)


def mesh_of(kind=AxisType.Auto, **sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))


def test_one_view_of_zeros_a_layer():
    cache = PagedAttentionCache.init_cache(None, jnp.bfloat16, CONFIG, None)
    assert len(cache.views) == 3
    for view in cache.views:
        assert view.key_pages.shape == view.value_pages.shape == (4, 6, 4, 8)
        assert view.key_pages.dtype == jnp.bfloat16
        assert not view.pages.data.any()
        assert view.mesh is view.head_axis is view.data_axis is None


def test_dtype_none_takes_the_configs():
    assert PagedAttentionCache.init_cache(None, None, CONFIG, None).views[0].pages.dtype == jnp.float32


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_heads_are_split_over_tp(kind):
    mesh = mesh_of(kind, dp=2, tp=4)
    view = PagedAttentionCache.init_cache(mesh, None, CONFIG, None).views[0]
    assert (view.head_axis, view.mesh) == ("tp", mesh)
    assert {shard.data.shape for shard in view.pages.data.addressable_shards} == {(6, 1, 4, 128)}
    # EasyDeL's view of it: `[kv_heads, pages, page_size, head_dim]`, split on the heads.
    assert view.key_pages.sharding.is_equivalent_to(
        jax.sharding.NamedSharding(mesh, PartitionSpec("tp", None, None, None)), 4
    )


def test_kv_heads_that_do_not_divide_are_replicated():
    view = PagedAttentionCache.init_cache(mesh_of(tp=8), None, CONFIG, None).views[0]
    assert view.head_axis is None
    assert view.pages.data.is_fully_replicated


def test_each_replica_has_pages_of_its_own():
    view = PagedAttentionCache.init_cache(mesh_of(dp=2, tp=4), None, CONFIG, None, data_axis="dp").views[0]
    assert (view.replicas, view.pages.num_pages) == (2, 12)
    assert {shard.data.shape for shard in view.pages.data.addressable_shards} == {(6, 1, 4, 128)}


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float8_e5m2", "int4"])
def test_scales_lie_with_their_pages(dtype):
    pages = PagedAttentionCache.init_cache(mesh_of(dp=2, tp=4), dtype, CONFIG, None, data_axis="dp").views[0].pages
    assert pages.dtype == dtype
    for array in (pages.data, pages.scales):
        assert {shard.data.shape[:2] for shard in array.addressable_shards} == {(6, 1)}


def test_allocation_makes_no_whole_copy():
    mesh = mesh_of(tp=4)
    gc.collect()
    before = set(map(id, jax.live_arrays()))
    cache = PagedAttentionCache.init_cache(mesh, None, CONFIG, None)
    made = [array for array in jax.live_arrays() if id(array) not in before]
    assert len(made) == len(cache.views)


@pytest.mark.parametrize(
    ("mesh_sizes", "axis", "message"),
    [
        ({"tp": 4}, "dp", r"data_axis='dp' must be one of the mesh's axes \('tp',\)"),
        ({"tp": 4}, "tp", "data_axis='tp' splits KV heads already"),
        ({}, "dp", "data_axis='dp' must be one of"),
    ],
)
def test_a_data_axis_that_cannot_be(mesh_sizes, axis, message):
    mesh = mesh_of(**mesh_sizes) if mesh_sizes else None
    with pytest.raises(ValueError, match=message):
        PagedAttentionCache.init_cache(mesh, None, CONFIG, None, data_axis=axis)


def test_more_pages_than_all_memory_holds_are_refused_before_any_is_taken():
    config = dataclasses.replace(CONFIG, num_pages=2**31 - 1)
    with pytest.raises(ValueError, match=r"num_pages=2147483647 needs .* bytes a device, which has"):
        PagedAttentionCache.init_cache(None, None, config, None)


def test_a_quantizer_is_refused_and_the_dtype_named():
    with pytest.raises(NotImplementedError, match=r"is not supported: the pages' dtype quantises.*dtype=\"int8\""):
        PagedAttentionCache.init_cache(None, None, CONFIG, None, quantizer=object())


def test_each_view_has_its_own_shape_type_and_head_axis():
    shapes = (
        KVShape(num_kv_heads=4, head_dim=8),
        KVShape(num_kv_heads=2, head_dim=16, v_head_dim=4),
        KVShape(num_kv_heads=1, head_dim=24, v_head_dim=16, latent=True, dtype="int8"),
    )
    config = dataclasses.replace(CONFIG, views=shapes)
    mesh = mesh_of(dp=2, tp=4)
    views = PagedAttentionCache.init_cache(mesh, jnp.bfloat16, config, None, data_axis="dp").views
    assert [view.key_pages.shape for view in views] == [(4, 12, 4, 8), (2, 12, 4, 16), (1, 12, 4, 24)]
    assert [view.value_pages.shape[-1] for view in views] == [8, 4, 16]
    assert [view.pages.dtype for view in views] == [jnp.bfloat16, jnp.bfloat16, jnp.int8]
    assert [view.head_axis for view in views] == ["tp", None, None]  # 2 heads and 1 do not divide by 4
    parts = [{shard.data.shape[:2] for shard in view.pages.data.addressable_shards} for view in views]
    assert parts == [{(6, 1)}, {(6, 2)}, {(6, 1)}]


def test_passes_through_jit_as_a_pytree():
    cache = PagedAttentionCache.init_cache(mesh_of(tp=4), None, CONFIG, None)
    again = jax.jit(lambda cache: cache)(cache)
    assert jax.tree.structure(again) == jax.tree.structure(cache)
    assert len(jax.tree.leaves(cache)) == 3
