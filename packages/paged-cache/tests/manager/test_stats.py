import dataclasses

import pytest
from managing import computed, ended, new_manager, write

from paged_cache._src.manager import LayerGroup


def changes(manager, operation):
    """Which figures an operation changes, and by how much."""
    before = dataclasses.asdict(manager.stats())
    operation()
    after = dataclasses.asdict(manager.stats())
    return {name: value - before[name] for name, value in after.items() if value != before[name]}


def test_a_new_manager_has_done_nothing():
    stats = new_manager(num_pages=9, page_size=4).stats()
    assert (stats.num_usable, stats.num_empty, stats.page_size) == (8, 8, 4)
    others = set(dataclasses.asdict(stats)) - {"num_pages", "num_empty", "page_size"}
    assert {getattr(stats, name) for name in others} == {0}
    assert (stats.hit_rate, stats.occupancy, stats.fragmentation) == (0, 0, 0)


def test_pages_are_in_use_cached_or_empty():
    manager = new_manager(num_pages=9)
    ended(manager, range(9))
    computed(manager, range(50, 60))
    stats = manager.stats()
    assert (stats.num_used, stats.num_cached, stats.num_empty) == (3, 3, 2)
    assert stats.occupancy == 3 / 8
    assert (manager.num_used, manager.num_cached, manager.num_free) == (3, 3, 5)


def test_the_hit_rate_is_the_share_of_prompt_tokens_that_were_cache_hits():
    manager = new_manager()
    ended(manager, range(8))
    assert changes(manager, lambda: manager.admit([*range(8), 9, 9])) == {
        "num_used": 3, "num_cached": -2, "num_empty": -1, "num_seqs": 1, "unused_slots": 2,
        "queried_tokens": 10, "cached_tokens": 8, "peak_used": 1,
    }  # fmt: skip
    assert manager.stats().hit_rate == 8 / 18


def test_a_refused_admission_is_not_counted():
    manager = new_manager()
    ended(manager, range(8))
    assert changes(manager, lambda: manager.cached_tokens(range(8))) == {}


def test_copies_swaps_and_evictions_are_counted_by_page():
    manager = new_manager(num_pages=5, num_host_pages=3, prefix_reuse=False)
    seq = computed(manager, range(6))
    (twin,) = manager.fork(seq)
    assert changes(manager, lambda: write(manager, twin, 1, [9]))["copies"] == 1
    assert changes(manager, lambda: manager.swap_out(seq))["swapped_out"] == 2
    assert changes(manager, lambda: manager.swap_in(seq))["swapped_in"] == 2
    manager = new_manager(num_pages=3)
    ended(manager, range(8))
    assert changes(manager, lambda: manager.admit(range(50, 55)))["evictions"] == 2


def test_the_high_water_mark_is_of_pages_at_the_end_of_operations():
    manager = new_manager()
    ended(manager, range(6))
    assert manager.stats().peak_used == 2
    manager.admit(range(8))  # for a moment, the partial page that is copied has an owner
    assert manager.stats().peak_used == 2
    other = new_manager()
    other.restore(manager.indexed_pages())
    assert other.stats().peak_used == 0
    other.pin(range(8))
    assert other.stats().peak_used == 1


@pytest.mark.parametrize(("length", "empty"), [(1, 3), (4, 0), (6, 2)])
def test_the_ends_of_last_pages_are_unused_slots(length, empty):
    manager = new_manager(groups=(LayerGroup.full(), LayerGroup.window(9)))
    manager.admit(range(length))
    stats = manager.stats()
    assert stats.unused_slots == 2 * empty
    assert stats.fragmentation == 2 * empty / (stats.num_used * 4)


def test_the_other_text_of_cross_attention_has_a_last_page_too():
    manager = new_manager(groups=(LayerGroup.full(), LayerGroup.cross()))
    manager.admit(range(3), cross_tokens=6)
    assert manager.stats().unused_slots == 1 + 2


def test_a_shared_page_counts_from_its_longest_sequence():
    manager = new_manager()
    seq = computed(manager, range(7))
    one, two = manager.fork(seq, 2)
    assert manager.stats().unused_slots == 1
    manager.truncate(one, 5)
    assert manager.stats().unused_slots == 1
    manager.release(seq)
    manager.truncate(two, 6)
    assert manager.stats().unused_slots == 2
    write(manager, two, 2, [7, 8])
    assert manager.stats().unused_slots == 3, "the other has a page of its own now, with one token"


def test_a_page_that_a_longer_sequence_shares_has_no_unused_slots():
    manager = new_manager()
    seq = computed(manager, range(8))
    (twin,) = manager.fork(seq)
    manager.truncate(twin, 6)
    assert manager.stats().unused_slots == 0
    manager.release(seq)
    assert manager.stats().unused_slots == 2
    manager.pin(range(8))
    assert manager.stats().unused_slots == 0


def test_a_swapped_sequence_counts_as_a_sequence_and_has_no_slots():
    manager = new_manager(num_host_pages=2, prefix_reuse=False)
    seq = computed(manager, range(6))
    assert changes(manager, lambda: manager.swap_out(seq)) == {
        "num_used": -2, "num_empty": 2, "unused_slots": -2, "swapped_out": 2
    }  # fmt: skip
    assert manager.stats().num_seqs == 1
