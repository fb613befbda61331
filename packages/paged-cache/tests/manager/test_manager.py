import hashlib

import numpy as np
import pytest
from managing import computed, cost, ended, new_manager, refused, table, write

from paged_cache._src.manager import LayerGroup, OutOfPages, Prompt

GROUPS = (LayerGroup.full(), LayerGroup.window(6))


def zeroed(manager):
    return [page for moves in manager.take_moves() for page in moves.zero.tolist()]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_pages": 1}, "num_pages=1 must be at least 2: page 0 is the null page"),
        ({"num_host_pages": -1}, "num_host_pages=-1 must be a whole number of at least 0"),
        ({"page_size": 0, "max_sequence_length": 4}, "page_size=0 must be a whole number of at least 1"),
        ({"max_seqs": 0}, "max_seqs=0 must be a whole number of at least 1"),
        ({"groups": ()}, r"groups=\(\) must have a self-attention group"),
    ],
)
def test_a_manager_that_could_hold_nothing_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        new_manager(**sizes)


def test_the_life_of_a_sequence():
    manager = new_manager(num_pages=5)
    seq = manager.admit([1, 2, 3])
    assert (manager.lengths(seq), manager.computed(seq), manager.num_used, manager.num_pages) == (3, 0, 1, 5)
    manager.commit(seq, 3)
    for token in (4, 5):
        manager.extend(seq, 1, [token])
        manager.commit(seq)
    assert table(manager, seq) == [1, 2]
    assert manager.token_ids(seq).tolist() == [1, 2, 3, 4, 5]
    manager.release(seq)
    assert (manager.num_used, manager.num_cached, manager.num_free) == (0, 2, 4)
    assert (manager.max_seqs, manager.max_sequence_length) == (6, 32)


# Extend


def test_extend_gives_pages_where_slots_run_out_and_only_there():
    manager = new_manager()
    seqs = [manager.admit(range(n)) for n in (3, 4, 8)]
    used = manager.num_used
    manager.extend(seqs, [1, 1, 9])
    assert manager.lengths(seqs).tolist() == [4, 5, 17]
    assert [len(table(manager, seq)) for seq in seqs] == [1, 2, 5]
    assert manager.num_used == used + 4
    assert len({page for seq in seqs for page in table(manager, seq)}) == 8, "each page has one owner"


def test_tokens_are_told_to_extend_or_to_commit():
    manager = new_manager()
    seqs = [computed(manager, [1]), computed(manager, [2])]
    manager.extend(seqs, [2, 1], [10, 11, 20])
    manager.extend(seqs)
    assert [manager.token_ids(seq).tolist() for seq in seqs] == [[1, 10, 11, -1], [2, 20, -1]]
    manager.commit(seqs, [3, 2], [10, 11, 12, 20, 21])
    assert [manager.token_ids(seq).tolist() for seq in seqs] == [[1, 10, 11, 12], [2, 20, 21]]


def test_extend_serves_all_sequences_or_changes_nothing():
    manager = new_manager(num_pages=7, groups=GROUPS)
    seqs = [computed(manager, range(start, start + 4)) for start in (0, 10, 20)]
    with refused(manager, OutOfPages, "asked for 2 pages, but 0 are free") as caught:
        manager.extend(seqs[:1])
    assert (caught.value.asked, caught.value.free) == (2, 0)
    manager.release(seqs[2])
    with refused(manager, OutOfPages, "asked for 4 pages, but 2 are free"):
        manager.extend(seqs[:2])
    manager.extend(seqs[0], 4)


def test_a_decode_step_makes_no_call_for_each_sequence():
    def calls(num_seqs):
        manager = new_manager(num_pages=300, page_size=8, max_seqs=num_seqs, groups=GROUPS)
        seqs = [computed(manager, range(n, n + 3)) for n in range(num_seqs)]
        step = lambda: write(manager, seqs, 1, range(num_seqs))  # noqa: E731
        step()  # numpy fills caches of its own
        return cost(step)[0]

    assert calls(4) == calls(64)


def test_an_operation_costs_the_same_beside_many_pages_and_sequences():
    def life(manager):
        seq = computed(manager, range(6))
        (twin,) = manager.fork(seq)
        write(manager, [seq, twin], 1, [7, 8])
        manager.truncate(seq, 2)
        manager.swap_out(twin)
        manager.swap_in(twin)
        manager.unpin(manager.pin(range(4)))
        manager.release([seq, twin])

    def calls_of(num_pages, max_seqs):
        manager = new_manager(num_pages=num_pages, max_seqs=max_seqs, num_host_pages=num_pages)
        for n in range(max_seqs - 2):
            computed(manager, [100 + n])
        return cost(lambda: life(manager))[0]

    calls_of(20, 4)  # numpy fills caches of its own
    assert calls_of(20, 4) == calls_of(20_000, 100)


# Truncate


@pytest.mark.parametrize(("num_tokens", "num_pages"), [(9, 3), (8, 2), (5, 2), (4, 1), (1, 1), (0, 0)])
def test_truncate_gives_back_the_pages_behind_the_last_token(num_tokens, num_pages):
    manager = new_manager(prefix_reuse=False)
    seq = computed(manager, range(10))
    held = table(manager, seq)
    manager.truncate(seq, num_tokens)
    assert table(manager, seq) == held[:num_pages]
    assert (manager.lengths(seq), manager.computed(seq), manager.num_used) == (num_tokens, num_tokens, num_pages)
    assert manager.token_ids(seq).tolist() == list(range(num_tokens))


def test_rejected_speculation_is_truncated_and_the_next_tokens_take_its_slots():
    manager = new_manager()
    seq = computed(manager, range(6))
    manager.extend(seq, 4, [60, 61, 62, 63])  # drafts
    manager.truncate(seq, 7)
    manager.commit(seq)
    manager.extend(seq, 1, [7])
    assert manager.token_ids(seq).tolist() == [*range(6), 60, 7]
    assert (manager.computed(seq), len(table(manager, seq))) == (7, 2)


def test_committed_tokens_that_are_rejected_and_rewritten_are_no_cache_hits():
    manager = new_manager()
    seq = computed(manager, range(8))
    manager.truncate(seq, 5)
    write(manager, seq, 3, [55, 66, 77])
    assert manager.cached_tokens(range(9)) == 5, "the first token of the page is still the same"
    assert manager.cached_tokens([*range(5), 55, 66, 77, 88]) == 8


def test_truncating_a_fork_leaves_the_other_alone():
    manager = new_manager()
    seq = computed(manager, range(10))
    (twin,) = manager.fork(seq)
    manager.truncate(twin, 3)
    assert manager.refcounts(table(manager, seq)).tolist() == [2, 1, 1]
    write(manager, twin, 1, [9])
    assert table(manager, seq)[0] != table(manager, twin)[0]
    assert manager.cached_tokens(range(12)) == 8


def test_truncating_to_more_tokens_than_there_are_is_refused():
    manager = new_manager()
    seq = manager.admit([1, 2, 3])
    with refused(manager, ValueError, r"num_tokens=4 must lie in 0\.\.3, the sequence's tokens"):
        manager.truncate(seq, 4)


def test_sizes_may_be_numpy_integers_but_no_other_numbers():
    manager = new_manager(groups=(LayerGroup.full(), LayerGroup.cross()))
    seq = manager.admit(range(12), chunk=np.uint32(10), cross_tokens=np.uint32(5))
    manager.truncate(seq, np.uint32(5))
    assert (len(table(manager, seq, 0)), len(table(manager, seq, 1)), manager.num_used) == (2, 2, 4)
    for call in (
        lambda: manager.admit([1], chunk=1.5, cross_tokens=1),
        lambda: manager.admit([1], cross_tokens=1.5),
        lambda: manager.truncate(seq, 1.5),
        lambda: manager.fork(seq, 1.5),
    ):
        with refused(manager, ValueError, "=1.5 must be a whole number of at least"):
            call()


# Fork and release


def test_forking_none_is_refused():
    manager = new_manager()
    seq = computed(manager, [1])
    with refused(manager, ValueError, "n=0 must be a whole number of at least 1"):
        manager.fork(seq, 0)


def test_releasing_many_releases_all_or_none():
    manager = new_manager()
    seqs = [computed(manager, [n]) for n in range(3)]
    with refused(manager, ValueError, "sequence 9 does not exist; was it released"):
        manager.release([*seqs, 9])
    with refused(manager, ValueError, f"sequence {seqs[1]} is named 2 times; name each once"):
        manager.release([*seqs, seqs[1]])
    manager.release(seqs)
    assert manager.num_used == 0


def test_tokens_that_were_not_computed_are_not_cached():
    manager = new_manager()
    seq = manager.admit(range(12))
    manager.commit(seq, 6)
    manager.release(seq)
    assert manager.cached_tokens(range(13)) == 6
    assert manager.num_cached == 2


def test_preemption_by_recomputation_hits_the_computed_pages():
    manager = new_manager()
    seq = computed(manager, range(10))
    tokens = manager.token_ids(seq)
    manager.release(seq)
    again = manager.admit([*tokens, 50])
    assert manager.computed(again) == 10


# Pins


def test_a_pinned_prefix_is_not_evicted():
    manager = new_manager(num_pages=4)
    ended(manager, range(9))
    pin = manager.pin(range(9))
    assert (pin.num_tokens, pin.pages.tolist(), manager.num_used) == (8, [2, 1], 2)
    with refused(manager, OutOfPages, "asked for 2 pages, but 1 are free"):
        manager.admit(range(50, 58))
    ended(manager, range(50, 54))
    assert manager.cached_tokens(range(9)) == 8
    manager.unpin(pin)
    manager.admit(range(50, 62))
    assert manager.cached_tokens(range(9)) == 0


def test_a_pin_holds_the_full_pages_that_are_there_all_of_the_prompt_if_need_be():
    manager = new_manager()
    ended(manager, Prompt(range(10), namespace="a"))
    assert manager.pin(Prompt(range(8), namespace="a")).num_tokens == 8
    assert manager.pin(Prompt(range(20), namespace="a")).num_tokens == 8
    assert manager.pin(range(8)).num_tokens == 0
    assert manager.refcounts([1, 2]).tolist() == [2, 2]


def test_of_a_window_only_the_pages_that_are_still_seen_are_pinned():
    manager = new_manager(groups=GROUPS)
    ended(manager, range(16))
    assert len(manager.pin(range(16)).pages) == 4 + 2


def test_a_pin_is_undone_once_by_the_manager_that_gave_it():
    manager, other = new_manager(), new_manager()
    ended(manager, range(4))
    pin = manager.pin(range(4))
    message = "pin is not one of this manager's, or was unpinned before"
    with refused(other, ValueError, message):
        other.unpin(pin)
    manager.unpin(pin)
    with refused(manager, ValueError, message):
        manager.unpin(pin)


# What is kept, and what is lost


def test_no_cache_hits_after_reset_prefix_cache():
    manager = new_manager()
    ended(manager, range(6))
    seq = computed(manager, range(50, 58))
    manager.reset_prefix_cache()
    assert manager.indexed_pages() == []
    assert [manager.cached_tokens(range(start, start + 9)) for start in (0, 50)] == [0, 0]
    assert (manager.num_cached, manager.num_used) == (0, 2)
    write(manager, seq, 4, range(4))
    assert manager.cached_tokens([*range(50, 58), *range(4), 9]) == 0, (
        "what comes after cannot be found without its start"
    )
    manager.release(seq)


def test_sequences_from_before_a_reset_are_not_indexed():
    manager = new_manager(num_host_pages=4)
    swapped, running, ending = (computed(manager, range(start, start + 7)) for start in (0, 50, 90))
    manager.swap_out(swapped)
    manager.reset_prefix_cache()
    manager.swap_in(swapped)
    write(manager, running, 1, [57])
    manager.release(ending)
    assert manager.indexed_pages() == []
    ended(manager, range(50, 58))
    assert manager.cached_tokens(range(50, 60)) == 8, "what is computed anew is"


def out_of_memory(data):
    raise MemoryError("no memory")


def test_a_commit_that_fails_to_hash_changes_nothing(monkeypatch):
    manager = new_manager()
    seq = computed(manager, range(3))
    manager.extend(seq, 6)
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "sha256", out_of_memory)
        with refused(manager, MemoryError, match="no memory"):
            manager.commit(seq, 6, range(3, 9))
    manager.commit(seq, 6, range(3, 9))
    assert manager.cached_tokens(range(9)) == 8


def test_a_page_is_zeroed_before_another_sequence_gets_it():
    manager = new_manager(num_pages=4, scrub=True)
    ended(manager, Prompt(range(12), namespace="a"))
    assert zeroed(manager) == [], "what is kept is not lost"
    seq = manager.admit(Prompt(range(6), namespace="b"))
    assert zeroed(manager) == table(manager, seq) == [3, 2]
    manager.release(seq)
    assert zeroed(manager) == [2, 3], "nothing of it was computed, so nothing is kept"


def test_a_shared_page_is_zeroed_after_the_last_release():
    manager = new_manager(scrub=True, prefix_reuse=False)
    seq = computed(manager, range(6))
    (twin,) = manager.fork(seq)
    manager.release(seq)
    assert zeroed(manager) == []
    manager.truncate(twin, 3)
    assert zeroed(manager) == [2]
    manager.release(twin)
    assert zeroed(manager) == [1]


def test_swapped_out_pages_are_read_before_they_are_zeroed():
    manager = new_manager(scrub=True, prefix_reuse=False, num_host_pages=2)
    seq = computed(manager, range(6))
    manager.swap_out(seq)
    (moves,) = manager.take_moves()
    assert moves.out_from.tolist() == [1, 2], "a phase reads all before it writes"
    assert sorted(moves.zero) == [1, 2]


def test_the_same_calls_give_the_same_tables_and_moves():
    assert tables_and_moves() == tables_and_moves()


def tables_and_moves():
    """What a manager says in the course of many calls."""
    manager = new_manager(num_pages=24, groups=GROUPS, num_host_pages=12, scrub=True)
    draw, seqs, said = np.random.default_rng(5), [], []
    for _ in range(60):
        if len(seqs) < 4:
            seqs.append(computed(manager, draw.integers(0, 2, draw.integers(1, 9))))
        seq = seqs[int(draw.integers(len(seqs)))]
        try:
            match draw.integers(4):
                case 0:
                    seqs += manager.fork(seq)
                case 1:
                    manager.swap_out(seq)
                    manager.swap_in(seq)
                case _:
                    write(manager, seqs, 1, draw.integers(0, 2, len(seqs)))
        except (OutOfPages, ValueError):  # too few pages or sequences, or one is too long
            manager.release(seq)
            seqs.remove(seq)
        said += [manager.page_tables(seqs).tolist()]
        said += [ids.tolist() for moves in manager.take_moves() for ids in vars(moves).values()]
    return said
