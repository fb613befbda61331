"""Pages to the host's memory and back, byte for byte."""

import numpy as np
import pytest
from filled_cache import NUM_PAGES, PAGE_SIZE, assert_same, filled_cache, mesh_of, moved, moves_of, pages_of, stored
from jax.sharding import AxisType

from paged_cache._src.manager import PageManager
from paged_cache._src.transfer import contents
from paged_cache._src.transfer.apply_moves import apply_moves, apply_moves_by_replica
from paged_cache._src.transfer.host_pages import HostPages

OUT = moves_of(out_from=[3, 1, 5], out_to=[1, 2, 3])
IN = moves_of(in_from=[3, 2], in_to=[9, 8])
AFTER = moves_of(copy_from=[5, 1], copy_to=[9, 8])
"""What both do to the pages, one after the other."""


@pytest.fixture(autouse=True)
def two_pages_at_a_time(monkeypatch):
    """So that three take two calls."""
    monkeypatch.setattr(contents, "STAGED_PAGES", 2)


@pytest.fixture(params=["pinned", "numpy"])
def memory(request):
    return request.param


def host_pages(cache, num_pages=4, memory="pinned"):
    host = HostPages.create(cache, num_pages)
    assert host.memory_kind == "pinned_host"  # jax's CPU devices have it
    if memory == "numpy":
        host.memory_kind = None
    return host


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("kind", [None, AxisType.Auto, AxisType.Explicit])
def test_what_comes_back_is_what_went_out(dtype, kind, memory):
    cache = filled_cache(kind and mesh_of(kind, tp=2), dtype=dtype)
    want, host = moved(stored(cache), AFTER), host_pages(cache, memory=memory)
    cache = apply_moves(cache, [OUT], host)
    cache = apply_moves(cache, [moves_of(zero=[1, 3, 5])], host)
    cache = apply_moves(cache, [IN, moves_of(in_from=[1, 2, 3], in_to=[3, 1, 5])], host)
    assert_same(stored(cache), want)


def test_each_replica_has_its_own_host_pages(memory):
    cache = filled_cache(mesh_of(dp=2, tp=2), "dp", dtype="int8")
    host = host_pages(cache, memory=memory)
    other = moves_of(out_from=[7], out_to=[2])
    back = moves_of(in_from=[2], in_to=[1])
    want = moved(stored(cache), AFTER)
    want = moved(want, moves_of(copy_from=[7], copy_to=[1]), first=NUM_PAGES)
    cache = apply_moves_by_replica(cache, [[OUT, IN], [other, back]], host)
    assert_same(stored(cache), want)
    page = sum(array[0].nbytes for array in stored(cache))
    assert host.nbytes == 4 * page


def test_in_a_phase_a_host_page_is_read_before_it_is_written():
    cache = filled_cache()
    host = host_pages(cache)
    cache = apply_moves(cache, [moves_of(out_from=[4], out_to=[1])], host)
    want = moved(stored(cache), moves_of(copy_from=[4, 7], copy_to=[6, 7]))
    swap = moves_of(in_from=[1], in_to=[6], out_from=[6], out_to=[1])
    before = pages_of(cache, [6])
    cache = apply_moves(cache, [swap], host)
    assert_same(stored(cache), want)
    assert_same(pages_of(apply_moves(cache, [moves_of(in_from=[1], in_to=[2])], host), [2]), before)


@pytest.mark.parametrize("mesh_sizes", [{}, {"tp": 2}])
def test_bytes_are_counted(mesh_sizes, memory):
    cache = filled_cache(mesh_of(**mesh_sizes) if mesh_sizes else None, dtype="int8")
    page = sum(array[0].nbytes for array in stored(cache))
    host = host_pages(cache, memory=memory)
    assert (host.nbytes, host.max_nbytes) == (0, 4 * page)
    cache = apply_moves(cache, [OUT], host)
    assert host.nbytes == 3 * page
    apply_moves(cache, [OUT], host)
    assert host.nbytes == 3 * page  # the same places again


def test_pages_lie_in_the_memory_that_is_said():
    cache = filled_cache()
    pinned, plain = host_pages(cache), host_pages(cache, memory="numpy")
    cache = apply_moves(cache, [OUT], pinned)
    apply_moves(cache, [OUT], plain)
    one, other = (next(iter(host.snapshot(np.array([[1]]))[0].values())) for host in (pinned, plain))
    assert one.sharding.memory_kind == "pinned_host"
    assert isinstance(other, np.ndarray)


def test_a_sequence_is_swapped_out_and_in_by_the_manager():
    cache = filled_cache()
    manager = PageManager(
        NUM_PAGES, PAGE_SIZE, max_seqs=2, max_sequence_length=32, num_host_pages=4, scrub=True, prefix_reuse=False
    )
    host = host_pages(cache)
    seq = manager.admit(range(10))
    manager.commit(seq, 10)
    before = pages_of(cache, manager.page_tables(seq)[0, 0, :3])
    manager.swap_out(seq)
    manager.admit(range(20))  # others write these pages in the meantime
    cache = apply_moves(cache, manager.take_moves(), host)
    manager.swap_in(seq)
    cache = apply_moves(cache, manager.take_moves(), host)
    assert_same(pages_of(cache, manager.page_tables(seq)[0, 0, :3]), before)


def test_there_must_be_room_for_a_page():
    with pytest.raises(ValueError, match="num_host_pages=0 must be at least 1; to swap nothing, create no HostPages"):
        HostPages.create(filled_cache(), 0)
