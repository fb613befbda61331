import pytest
from managing import computed, ended, new_manager, refused, table, write

from paged_cache._src.manager import LayerGroup, OutOfPages

BOTH = (LayerGroup.full(), LayerGroup.window(6))


def copies(manager):
    """The copies that the device is to make, phase by phase."""
    return [(moves.copy_from.tolist(), moves.copy_to.tolist()) for moves in manager.take_moves()]


# Fork, and copy on write


def test_a_fork_shares_every_page():
    manager = new_manager(groups=BOTH)
    seq = computed(manager, range(10))
    used = manager.num_used
    twins = manager.fork(seq, 2)
    assert manager.num_used == used
    assert (manager.page_tables(twins) == manager.page_tables(seq)).all()
    assert manager.lengths(twins).tolist() == manager.computed(twins).tolist() == [10, 10]
    assert [manager.token_ids(twin).tolist() for twin in twins] == [list(range(10))] * 2
    assert manager.refcounts(table(manager, seq)).tolist() == [3, 3, 3]
    assert manager.take_moves() == []


def test_the_first_to_write_a_shared_page_gets_a_copy_and_the_last_writes_in_place():
    manager = new_manager()
    seq = computed(manager, range(6))
    (twin,) = manager.fork(seq)
    manager.extend(twin, 1, [9])
    assert copies(manager) == [([2], [3])]
    assert (table(manager, seq), table(manager, twin)) == ([1, 2], [1, 3])
    manager.extend(seq, 1, [8])
    assert copies(manager) == []
    assert table(manager, seq) == [1, 2]
    assert manager.refcounts([1, 2, 3]).tolist() == [2, 1, 1]


def test_siblings_that_write_in_one_call_leave_the_page_to_the_last_of_them():
    manager = new_manager()
    seq = computed(manager, range(6))
    family = [seq, *manager.fork(seq, 2)]
    write(manager, family, 1, [7, 8, 9])
    assert copies(manager) == [([2, 2], [3, 4])]
    assert [table(manager, each) for each in family] == [[1, 3], [1, 4], [1, 2]]
    assert [manager.token_ids(each)[-1] for each in family] == [7, 8, 9]


def test_siblings_that_write_while_another_does_not_all_get_copies():
    manager = new_manager()
    seq = computed(manager, range(6))
    one, two = manager.fork(seq, 2)
    write(manager, [one, two], 1, [7, 8])
    assert copies(manager) == [([2, 2], [3, 4])]
    assert table(manager, seq) == [1, 2]


def test_two_families_in_one_call_do_not_mix():
    manager = new_manager()
    seqs = [computed(manager, [start]) for start in (10, 20)]
    twins = [manager.fork(seq)[0] for seq in seqs]
    write(manager, [seqs[0], seqs[1], twins[1], twins[0]], 1, [0, 1, 2, 3])
    assert copies(manager) == [([1, 2], [3, 4])]
    assert [table(manager, each) for each in (*seqs, *twins)] == [[3], [4], [1], [2]]


def test_every_group_copies_its_own_page():
    manager = new_manager(groups=BOTH)
    seq = computed(manager, range(6))
    (twin,) = manager.fork(seq)
    shared = [table(manager, seq, group)[1] for group in (0, 1)]
    write(manager, twin, 1, [9])
    assert copies(manager) == [(shared, [table(manager, twin, group)[1] for group in (0, 1)])]


def test_full_pages_are_never_copied():
    manager = new_manager()
    seq = computed(manager, range(8))
    (twin,) = manager.fork(seq)
    write(manager, [seq, twin], 1, [8, 9])
    assert copies(manager) == []
    assert (table(manager, seq), table(manager, twin)) == ([1, 2, 3], [1, 2, 4])


def test_a_pinned_page_is_copied_before_it_is_written_again():
    manager = new_manager()
    seq = computed(manager, range(8))
    manager.pin(range(8))
    manager.truncate(seq, 6)
    write(manager, seq, 1, [9])
    assert copies(manager) == [([2], [3])]
    assert manager.cached_tokens(range(9)) == 8


def test_a_page_that_is_rewritten_leaves_the_index():
    manager = new_manager()
    seq = computed(manager, range(8))
    manager.truncate(seq, 6)
    assert manager.cached_tokens(range(9)) == 8, "nothing has been written yet"
    manager.extend(seq, 1, [9])
    assert manager.cached_tokens(range(9)) == 4
    manager.commit(seq)
    manager.release(seq)
    assert manager.cached_tokens([*range(6), 9, 9]) == 7


def test_copies_count_among_the_pages_that_must_be_free():
    manager = new_manager(num_pages=3)
    seq = computed(manager, range(6))
    twins = manager.fork(seq, 2)
    with refused(manager, OutOfPages, "asked for 2 pages, but 0 are free"):
        manager.extend([seq, *twins])
    manager.release(twins)
    manager.extend(seq)
    assert table(manager, seq) == [1, 2]


# Swap


def swapped(moves):
    return {name: ids.tolist() for name, ids in vars(moves).items() if len(ids)}


def test_a_swapped_sequence_leaves_its_pages_and_comes_back():
    manager = new_manager(groups=BOTH, num_host_pages=8, prefix_reuse=False)
    seq = computed(manager, range(14))
    pages = [page for group in (0, 1) for page in table(manager, seq, group) if page]
    manager.swap_out(seq)
    (moves,) = manager.take_moves()
    assert swapped(moves) == {"out_from": pages, "out_to": [1, 2, 3, 4, 5, 6]}
    assert manager.num_used == 0
    other = computed(manager, range(50, 55))
    manager.swap_in(seq)
    (moves,) = manager.take_moves()
    back = [page for group in (0, 1) for page in table(manager, seq, group) if page]
    assert swapped(moves) == {"in_from": [1, 2, 3, 4, 5, 6], "in_to": back}
    assert not set(back) & {*table(manager, other), *table(manager, other, 1)}
    assert table(manager, seq, 1)[:2] == [0, 0], "what the window had returned stays so"
    write(manager, seq, 1, [14])
    assert manager.token_ids(seq).tolist() == list(range(15))


def test_swapped_out_content_stays_indexed_on_the_device_and_is_indexed_after_swap_in():
    manager = new_manager(num_pages=4, num_host_pages=3)
    seq = computed(manager, range(9))
    manager.swap_out(seq)
    assert manager.cached_tokens(range(12)) == 8
    manager.release(manager.admit(range(50, 62)))  # evicts all
    assert manager.cached_tokens(range(12)) == 0
    manager.swap_in(seq)
    assert manager.cached_tokens(range(12)) == 8


def test_the_lengths_of_a_swapped_sequence_can_be_asked_but_its_table_cannot():
    manager = new_manager(num_host_pages=2)
    seq = computed(manager, range(6))
    manager.swap_out(seq)
    assert (manager.lengths(seq), manager.computed(seq)) == (6, 6)
    with refused(manager, ValueError, f"sequence {seq} is swapped out; call swap_in first"):
        manager.page_tables(seq)


def test_releasing_a_swapped_sequence_frees_its_host_pages():
    manager = new_manager(num_host_pages=2)
    for _ in range(3):
        seq = computed(manager, range(6))
        manager.swap_out(seq)
        manager.release(seq)
    with refused(manager, ValueError, f"sequence {seq} does not exist"):
        manager.swap_in(seq)


def test_a_shared_page_is_swapped_for_one_and_stays_for_the_other():
    manager = new_manager(num_host_pages=4)
    seq = computed(manager, range(6))
    (twin,) = manager.fork(seq)
    manager.swap_out(twin)
    assert table(manager, seq) == [1, 2]
    manager.swap_in(twin)
    assert not set(table(manager, twin)) & {1, 2}


def test_swapping_without_room_is_refused_on_either_side():
    manager = new_manager(num_pages=4, num_host_pages=3)
    seq, other = computed(manager, range(6)), computed(manager, [50])
    manager.swap_out(seq)
    (twin,) = manager.fork(other)
    manager.swap_out(other)
    with refused(manager, OutOfPages, "asked for 1 host pages, but 0 are free; .* or raise num_host_pages"):
        manager.swap_out(twin)
    manager.extend(twin, 7)
    with refused(manager, OutOfPages, "asked for 2 pages, but 1 are free; .* or raise num_pages"):
        manager.swap_in(seq)


def test_only_a_sequence_that_is_swapped_out_can_be_swapped_in():
    manager = new_manager(num_host_pages=2)
    seq = computed(manager, [1])
    with refused(manager, ValueError, f"sequence {seq} is not swapped out"):
        manager.swap_in(seq)


@pytest.mark.parametrize(("call", "doing"), [("fork", "forked"), ("swap_out", "swapped out")])
def test_operations_that_need_all_tokens_computed_are_refused_before(call, doing):
    manager = new_manager(num_host_pages=2)
    seq = manager.admit([1, 2])
    message = f"2 tokens of the sequence are not computed, so it cannot be {doing}; commit or truncate"
    with refused(manager, ValueError, message):
        getattr(manager, call)(seq)


def test_swapping_a_sequence_without_pages_moves_nothing():
    manager = new_manager()
    seq = computed(manager, [1])
    manager.truncate(seq, 0)
    manager.swap_out(seq)
    manager.swap_in(seq)
    write(manager, seq, 1, [2])
    assert manager.take_moves() == []
    assert table(manager, seq) == [1]


def test_a_sequence_releases_its_pages_from_the_end():
    manager = new_manager(num_pages=5, prefix_reuse=False)
    ended(manager, range(12))
    assert table(manager, manager.admit(range(12))) == [1, 2, 3]
