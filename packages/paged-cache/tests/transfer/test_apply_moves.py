"""Moves on devices, byte for byte against numpy; pages that must not be touched hold NaNs and random bytes."""

import functools

import jax
import numpy as np
import pytest
from filled_cache import KINDS, NUM_PAGES, assert_same, filled_cache, mesh_of, moved, moves_of, pages_of, stored
from jax.sharding import AxisType

from paged_cache import KVShape, PagedAttentionCache
from paged_cache._src.manager import PageManager
from paged_cache._src.transfer import apply_moves as device
from paged_cache._src.transfer import contents
from paged_cache._src.transfer.apply_moves import apply_moves, apply_moves_by_replica, moves_of_one, warm_up_moves
from paged_cache._src.transfer.host_pages import HostPages

MESHES = {
    "one device": functools.partial(dict),
    "heads": lambda: {"mesh": mesh_of(tp=2)},
    "heads, explicit": lambda: {"mesh": mesh_of(AxisType.Explicit, tp=2)},
    "heads replicated": lambda: {"mesh": mesh_of(AxisType.Explicit, x=2)},
}
PHASE = moves_of(copy_from=[1, 2, 5], copy_to=[2, 3, 11], zero=[7, 4])
"""Page 2 is read and written: all reads come first."""


def where(cache):
    arrays = jax.tree.leaves(cache)
    return [shard.data.unsafe_buffer_pointer() for array in arrays for shard in array.addressable_shards]


@pytest.mark.parametrize(
    ("kind", "mesh"), [*((kind, "one device") for kind in KINDS), *(("int8", mesh) for mesh in list(MESHES)[1:])]
)
def test_a_phase_copies_and_zeroes_and_touches_nothing_else(kind, mesh):
    cache = filled_cache(**KINDS[kind], **MESHES[mesh]())
    want, before = moved(stored(cache), PHASE), where(cache)
    shardings = [array.sharding for array in jax.tree.leaves(cache)]
    after = apply_moves(cache, [PHASE])
    assert_same(stored(after), want)
    assert where(after) == before  # donated
    for array, sharding in zip(jax.tree.leaves(after), shardings, strict=True):
        assert array.sharding.is_equivalent_to(sharding, array.ndim)
    assert jax.tree.structure(after) == jax.tree.structure(cache)


UNLIKE = (
    KVShape(num_kv_heads=2, head_dim=8),
    KVShape(num_kv_heads=1, head_dim=16, v_head_dim=4, latent=True),
    KVShape(num_kv_heads=3, head_dim=160, dtype="int8"),
)


@pytest.mark.parametrize("mesh_sizes", [{}, {"tp": 2}, {"dp": 2, "tp": 2}], ids=["one device", "heads", "replicas"])
def test_moves_reach_every_view_of_a_cache_whose_views_differ(mesh_sizes):
    mesh = mesh_of(AxisType.Explicit, **mesh_sizes) if mesh_sizes else None
    cache = filled_cache(mesh, "dp" if "dp" in mesh_sizes else None, views=UNLIKE)
    cache = warm_up_moves(cache, 5)
    assert [view.head_axis for view in cache.views] == ["tp" if mesh else None, None, None]
    want, before, compiled = stored(cache), where(cache), device._copy._cache_size()
    phases = [[PHASE]] * cache.views[0].replicas
    for replica in range(cache.views[0].replicas):
        want = moved(want, PHASE, first=replica * NUM_PAGES)
    after = apply_moves_by_replica(cache, phases)
    assert_same(stored(after), want)
    assert where(after) == before
    assert jax.tree.structure(after) == jax.tree.structure(cache)
    assert device._copy._cache_size() == compiled


def test_phases_come_one_after_the_other():
    cache = filled_cache()
    phases = [PHASE, moves_of(copy_from=[3], copy_to=[1]), moves_of(zero=[3])]
    want = functools.reduce(moved, phases, stored(cache))
    assert_same(stored(apply_moves(cache, phases)), want)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_each_replica_has_its_own_moves(kind):
    cache = filled_cache(mesh_of(kind, dp=2, tp=2), "dp")
    first, second = [PHASE, moves_of(zero=[1])], [moves_of(copy_from=[9], copy_to=[1])]
    want = functools.reduce(moved, first, stored(cache))
    want = moved(want, second[0], first=NUM_PAGES)
    before = where(cache)
    after = apply_moves_by_replica(cache, [first, second])
    assert_same(stored(after), want)
    assert where(after) == before


def test_moves_of_one_replica():
    cache = filled_cache(mesh_of(dp=2, tp=2), "dp")
    want = moved(stored(cache), PHASE, first=NUM_PAGES)
    assert_same(stored(apply_moves_by_replica(cache, moves_of_one(cache, [PHASE], 1))), want)


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "float8"])
def test_the_pool_is_not_copied_on_the_way(kind):
    cache = filled_cache(num_pages=256, views=3, **KINDS[kind])
    memory = device._copy.lower(cache, np.zeros((1, 2, 4), np.int32)).compile().memory_analysis()
    pool = sum(array.nbytes for array in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes == pool
    assert memory.temp_size_in_bytes <= 2 * 4 * pool // 256 + 4096  # the four pages, on CPUs in a wider type


def test_without_moves_nothing_is_called(monkeypatch):
    monkeypatch.delattr(device, "_copy")
    cache = filled_cache()
    assert apply_moves(cache, []) is cache
    assert apply_moves(cache, [moves_of()], HostPages.create(cache, 1)) is cache


def test_one_call_does_a_phase_in_all_layers(monkeypatch):
    calls = []
    monkeypatch.setattr(device, "_copy", lambda cache, ids: calls.append(ids.shape) or cache)
    apply_moves(filled_cache(), [PHASE])
    assert calls == [(1, 2, 8)]


def test_nothing_is_compiled_after_the_warm_up(monkeypatch):
    monkeypatch.setattr(contents, "STAGED_PAGES", 2)
    cache = filled_cache()
    host, before = HostPages.create(cache, 5), stored(cache)
    cache = warm_up_moves(cache, 3, host)
    assert_same(stored(cache), before)
    calls = (device._copy, contents._read, contents._write)
    compiled = [call._cache_size() for call in calls]
    for n in range(1, 4):
        here, there = range(1, n + 1), range(5, n + 5)
        phases = [moves_of(copy_from=here, copy_to=there, out_from=here, out_to=here), moves_of(zero=here)]
        cache = apply_moves(cache, [*phases, moves_of(in_from=here, in_to=here)], host)
    assert_same(stored(cache), moved(before, moves_of(copy_from=here, copy_to=there)))
    assert [call._cache_size() for call in calls] == compiled


@pytest.mark.parametrize("mesh", [dict, lambda: {"mesh": mesh_of(AxisType.Explicit, dp=2, tp=2), "data_axis": "dp"}])
def test_all_that_is_sent_is_sent_explicitly(mesh):
    cache = filled_cache(**mesh())
    host, groups = HostPages.create(cache, 4), cache.views[0].replicas
    phases = [[PHASE, moves_of(out_from=[3], out_to=[1]), moves_of(in_from=[1], in_to=[4])]] * groups
    with jax.transfer_guard_host_to_device("disallow"):  # as engines set it, to find what slows a step down
        apply_moves_by_replica(warm_up_moves(cache, 8, host), phases, host)


def test_a_scrubbed_page_reads_as_zeros():
    cache = filled_cache()
    manager = PageManager(NUM_PAGES, 4, max_seqs=2, max_sequence_length=32, scrub=True, prefix_reuse=False)
    seq = manager.admit(range(10))
    pages = manager.page_tables(seq)[0, 0, :3]
    cache = apply_moves(cache, manager.take_moves())
    manager.release(seq)
    before = stored(cache)
    after = apply_moves(cache, manager.take_moves())
    assert all(not array.any() for array in pages_of(after, pages))
    assert_same(stored(after), moved(before, moves_of(zero=pages)))


@pytest.mark.parametrize(
    ("moves", "host_pages", "message"),
    [
        (moves_of(copy_from=[1], copy_to=[12]), 0, r"copy_to holds 12, but pages are 1\.\.11; .* same num_pages"),
        (moves_of(copy_from=[0], copy_to=[1]), 0, "copy_from holds 0"),
        (moves_of(zero=[3, -1]), 0, "zero holds -1"),
        (moves_of(out_from=[12], out_to=[1]), 2, "out_from holds 12"),
        (moves_of(out_from=[1], out_to=[3]), 2, r"out_to holds 3, but pages are 1\.\.2"),
        (moves_of(in_from=[0], in_to=[1]), 2, "in_from holds 0"),
        (moves_of(in_from=[1], in_to=[99]), 2, "in_to holds 99"),
        (moves_of(out_from=[1], out_to=[1]), 0, "moves swap pages, but host is None; pass a HostPages"),
        (moves_of(in_from=[1], in_to=[1]), 2, "host page 1 of replica 0 holds nothing; give apply_moves every list"),
    ],
)
def test_moves_that_cannot_be_are_refused_and_nothing_is_done(moves, host_pages, message):
    cache = filled_cache()
    before, host = stored(cache), HostPages.create(cache, host_pages) if host_pages else None
    with pytest.raises(ValueError, match=message):
        apply_moves(cache, [moves], host)
    assert_same(stored(cache), before)


def test_each_replica_needs_a_list():
    with pytest.raises(ValueError, match="moves of 1 replicas, but the cache has 2; give apply_moves_by_replica one"):
        apply_moves(filled_cache(mesh_of(dp=2, tp=2), "dp"), [PHASE])


def test_layers_that_differ_can_be_copied_but_not_swapped():
    small, large = filled_cache(views=1), filled_cache(views=1, num_kv_heads=4)
    cache = PagedAttentionCache(small.views + large.views)
    with pytest.raises(NotImplementedError, match=r"layers have pages of 2 kinds .* keep a cache for each kind"):
        HostPages.create(cache, 1)
    want = moved(stored(cache), PHASE)
    assert_same(stored(apply_moves(cache, [PHASE])), want)
