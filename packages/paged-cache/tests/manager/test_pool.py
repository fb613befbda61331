import numpy as np
import pytest
from managing import cost, refused

from paged_cache._src.manager import OutOfPages, PagePool


def pages(*ids):
    return np.array(ids, np.int32)


def kept(num_pages, *order):
    """A pool whose pages are all cached, released in this order."""
    pool = PagePool(num_pages)
    pool.allocate(num_pages - 1)
    pool.release(pages(*order), is_indexed=np.ones(num_pages, bool))
    return pool


def test_every_page_but_the_null_page_is_allocated_once():
    assert PagePool(5).allocate(4).tolist() == [1, 2, 3, 4]


def test_allocating_none_takes_nothing():
    pool = PagePool(3)
    assert pool.allocate(0).tolist() == []
    assert pool.num_free == 2


def test_the_page_released_last_goes_out_first():
    pool = PagePool(4)
    pool.allocate(3)
    assert pool.release(pages(2, 3)).tolist() == [2, 3]
    assert pool.allocate(2).tolist() == [3, 2]


def test_running_out_of_pages_can_be_waited_out():
    pool = PagePool(4)
    held = pool.allocate(2)
    with refused(pool, OutOfPages, r"asked for 2 pages, but 1 are free; .* wait") as caught:
        pool.allocate(2)
    assert (caught.value.asked, caught.value.free) == (2, 1)
    pool.release(held)
    assert len(pool.allocate(2)) == 2


def test_a_pool_says_whose_pages_have_run_out():
    with pytest.raises(OutOfPages, match="asked for 1 host pages, but 0 are free"):
        PagePool(1, "host ").allocate(1)


def test_shared_pages_stay_in_use_until_the_last_release():
    pool = PagePool(4)
    prefix = pool.allocate(2)
    pool.share(prefix, 2)
    assert pool.refcounts(prefix).tolist() == [3, 3]
    for _ in range(2):
        assert pool.release(prefix).tolist() == []
    assert pool.num_used == 2
    assert pool.release(prefix).tolist() == prefix.tolist()
    assert pool.num_used == 0


@pytest.mark.parametrize("call", ["share", "release"])
@pytest.mark.parametrize(
    ("page", "message"),
    [
        (0, r"page 0 must lie in 1\.\.4"),
        (5, r"page 5 must lie"),
        (-1, r"page -1 must lie"),
        (4, "page 4 has a refcount of 0"),
    ],
)
def test_wrong_pages_are_refused_and_nothing_changes(call, page, message):
    pool = PagePool(5)
    pool.allocate(2)
    with refused(pool, ValueError, message):
        getattr(pool, call)(pages(1, page))


def test_a_cached_page_is_free_until_it_is_allocated_or_shared():
    pool = kept(4, 1, 2, 3)
    assert (pool.num_empty, pool.num_cached, pool.num_free, pool.num_used) == (0, 3, 3, 0)
    pool.share(pages(2))  # out of the middle of the queue
    assert (pool.num_cached, pool.num_used, pool.refcounts(2)) == (2, 1, 1)
    assert pool.allocate(2).tolist() == [1, 3]


def test_empty_pages_are_allocated_before_cached_ones_and_these_in_lru_order():
    pool = kept(5, 4, 2, 1, 3)
    pool.share(pages(4))
    pool.release(pages(4), is_indexed=np.ones(5, bool))  # used again
    pool.share(pages(1))
    pool.release(pages(1))  # holds nothing any more
    assert pool.allocate(4).tolist() == [1, 2, 3, 4]


def test_a_cached_page_can_be_shared_several_times_at_once():
    pool = kept(3, 1, 2)
    pool.share(pages(1, 1))
    assert (pool.refcounts(1), pool.num_cached) == (2, 1)


def test_a_double_release_is_refused():
    pool = PagePool(5)
    pool.allocate(2)
    pool.release(pages(1))
    with refused(pool, ValueError, "page 1 has a refcount of 0, but would be released more often; release"):
        pool.release(pages(2, 1))


def test_releasing_a_page_twice_needs_a_refcount_of_two():
    pool = PagePool(5)
    pool.allocate(1)
    with refused(pool, ValueError, "page 1 has a refcount of 1, but would be released more often"):
        pool.release(pages(1, 1))
    pool.share(pages(1, 1))
    assert pool.release(pages(1, 1, 1)).tolist() == [1]


def test_dropped_pages_are_empty():
    pool = kept(4, 1, 2, 3)
    pool.drop_cached(pages(2))
    assert (pool.num_empty, pool.num_cached) == (1, 2)
    with refused(pool, ValueError, "page 2 is not cached, so it cannot be dropped"):
        pool.drop_cached(pages(1, 2))
    assert pool.allocate(3).tolist() == [2, 1, 3]


def test_negative_and_tiny_numbers_are_refused():
    pool = PagePool(3)
    with refused(pool, ValueError, "n=-1 must not be negative"):
        pool.allocate(-1)
    with pytest.raises(ValueError, match="num_pages=0 must be at least 1: page 0 is the null page, never handed out"):
        PagePool(0)


def test_an_operation_costs_the_same_in_a_large_pool():
    def operate(pool, keep):
        middle = pages(pool.num_pages // 2)
        pool.share(middle)  # out of the middle of the queue
        pool.release(middle, keep)
        pool.allocate(3)  # evicts
        pool.release(pages(1), keep)

    def cost_in(num_pages):
        pool, keep = kept(num_pages, *range(1, num_pages)), np.ones(num_pages, bool)
        return cost(lambda: operate(pool, keep))

    cost_in(9)  # numpy fills caches of its own
    (calls, _), (calls_in_large, bytes_in_large) = cost_in(9), cost_in(20_000)
    assert calls_in_large == calls
    assert bytes_in_large < 20_000, "no array is as long as the pool"
