import numpy as np
import pytest
from managing import computed, new_manager, refused

from paged_cache._src.manager.sequences import Sequences


@pytest.mark.parametrize("wrong", ["max_seqs", "max_sequence_length", "page_size"])
def test_sizes_below_one_are_refused(wrong):
    sizes = {"max_seqs": 2, "max_sequence_length": 8, "page_size": 4, wrong: 0}
    with pytest.raises(ValueError, match=f"{wrong}=0 must be a whole number of at least 1"):
        Sequences(**sizes, num_groups=1)


def test_a_table_has_entries_for_the_longest_sequence():
    assert new_manager(page_size=4, max_sequence_length=9).page_tables([]).shape == (1, 0, 3)


def test_an_id_is_never_used_again():
    manager = new_manager(max_seqs=2)
    seen = set()
    for _ in range(5):
        seqs = [manager.admit([1]), manager.admit([1])]
        manager.release(seqs)
        assert not seen & {*seqs}
        seen |= {*seqs}


def test_one_id_and_lists_of_ids_name_sequences():
    manager = new_manager()
    seqs = [manager.admit(range(n)) for n in (3, 9)]
    assert manager.lengths(seqs[1]).tolist() == [9]
    assert manager.lengths(seqs).tolist() == manager.lengths(np.array(seqs, np.int16)).tolist() == [3, 9]
    assert manager.page_tables(seqs[::-1])[0].tolist() == [
        manager.page_tables(seq)[0, 0].tolist() for seq in seqs[::-1]
    ]
    assert manager.page_tables(seqs).dtype == manager.lengths(seqs).dtype == manager.computed(seqs).dtype == np.int32


def test_a_table_that_was_given_stays_as_it_was():
    manager = new_manager()
    seq = manager.admit([1])
    manager.page_tables(seq)[:] = 9
    manager.lengths(seq)[:] = 9
    manager.token_ids(seq)[:] = 9
    assert (manager.page_tables(seq).max(), manager.lengths(seq), manager.token_ids(seq)) == (1, 1, 1)


@pytest.mark.parametrize(
    ("seqs", "message"),
    [
        (5, "sequence 5 does not exist; was it released"),
        (-6, "sequence -6 does not exist"),
        ([0, 7], "sequence 7 does not exist"),
        ([0, 1], "sequence 1 does not exist"),
        ([0, 2, 0, 0], "sequence 0 is named 3 times; name each once"),
        ([0, 3], "sequence 3 is swapped out; call swap_in first"),
        ([[0]], r"seqs=\[\[0\]\] must be one sequence id or a list of them"),
        ([0.5], r"seqs=\[0\.5\] must be one sequence id"),
        ("a", "seqs='a' must be one sequence id"),
    ],
)
def test_wrong_sequence_ids_are_refused(seqs, message):
    manager = new_manager(num_host_pages=2)
    for _ in range(4):
        computed(manager, [1])
    manager.release(1)
    manager.swap_out(3)
    for call in (manager.extend, manager.commit, manager.page_tables):
        with refused(manager, ValueError, message):
            call(seqs)


@pytest.mark.parametrize(
    "call",
    ["fork", "swap_out", "swap_in", "token_ids", lambda manager, seqs: manager.truncate(seqs, 0)],
    ids=["fork", "swap_out", "swap_in", "token_ids", "truncate"],
)
def test_several_sequences_are_refused_where_one_is_meant(call):
    manager = new_manager()
    seqs = [computed(manager, [1]), computed(manager, [2])]
    with refused(manager, ValueError, r"seq=\[0, 1\] must be one sequence id"):
        getattr(manager, call)(seqs) if isinstance(call, str) else call(manager, seqs)


def test_more_sequences_than_there_can_be_are_refused():
    manager = new_manager(max_seqs=3)
    seq = computed(manager, [1])
    message = r"{} more sequences are too many beside {} of max_seqs=3; release some, or raise max_seqs"
    with refused(manager, ValueError, message.format(3, 1)):
        manager.fork(seq, 3)
    manager.fork(seq, 2)
    with refused(manager, ValueError, message.format(1, 3)):
        manager.admit([2])


def test_sequences_that_are_too_long_are_refused():
    manager = new_manager(max_sequence_length=10)
    message = "a sequence of 11 tokens is longer than max_sequence_length=10; end it, or raise max_sequence_length"
    with refused(manager, ValueError, message):
        manager.admit(range(11))
    seqs = [manager.admit(range(10)), manager.admit(range(9))]
    with refused(manager, ValueError, message):
        manager.extend(seqs)
    manager.extend(seqs[1])


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([1], r"counts=\[1\] must be a whole number, or one for each of 2 sequences"),
        ([[1, 1]], "counts=.* must be a whole number"),
        (1.0, "counts=1.0 must be a whole number"),
        ([1, 0], r"counts holds 0; each must lie in 1 \.\. 2\*\*31 - 1; leave out sequences without any"),
        (-3, "counts holds -3"),
        (2**32 + 1, f"counts holds {2**32 + 1}"),
    ],
)
def test_counts_that_are_no_counts_are_refused(counts, message):
    manager = new_manager()
    seqs = [manager.admit([1]), manager.admit([2])]
    for call in (manager.extend, manager.commit):
        with refused(manager, ValueError, message):
            call(seqs, counts)


def test_a_count_is_for_each_sequence_or_one_for_all():
    seqs = Sequences(max_seqs=2, max_sequence_length=8, page_size=4, num_groups=1)
    assert seqs.check_counts(1, 2).tolist() == [1, 1]
    assert seqs.check_counts(3, 2).tolist() == [3, 3]
    assert seqs.check_counts(np.array([3, 4], np.uint8), 2).tolist() == [3, 4]
    assert seqs.check_counts([], 0).tolist() == []


def test_a_count_that_reaches_beyond_the_longest_sequence_is_refused_however_large():
    manager = new_manager()
    seq = manager.admit([1])
    with refused(manager, ValueError, f"a sequence of {2**31} tokens is longer than max_sequence_length=32"):
        manager.extend(seq, 2**31 - 1)


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        ([1, 2], r"token_ids has shape \(2,\); it must hold 3 ids, all sequences' one after another"),
        ([[1, 2, 3]], r"token_ids has shape \(1, 3\)"),
        ([1, 2, -1], r"token_ids hold -1; each must lie in 0 \.\. 2\*\*31 - 1"),
    ],
)
def test_tokens_that_do_not_fit_the_counts_are_refused(token_ids, message):
    manager = new_manager()
    seqs = [manager.admit([1, 1]), manager.admit([2])]
    for call in (manager.extend, manager.commit):
        with refused(manager, ValueError, message):
            call(seqs, [2, 1], token_ids)


def test_commit_may_repeat_known_token_ids_but_not_contradict_them():
    manager = new_manager()
    seq = manager.admit([1, 2])
    manager.commit(seq, 2, [1, 2])
    manager.extend(seq, 3, [3, 4, 5])
    with refused(manager, ValueError, r"token_ids\[1\]=9, but extend was told 4; truncate, and extend anew"):
        manager.commit(seq, 3, [3, 9, 5])
    manager.commit(seq, 2, [3, 4])
    assert manager.computed(seq) == 4


def test_committing_more_than_has_a_slot_is_refused():
    manager = new_manager()
    seqs = [manager.admit([1, 2]), manager.admit([3])]
    with refused(manager, ValueError, r"counts\[1\]=2 is more than the 1 tokens left; extend before it"):
        manager.commit(seqs, 2)


def test_a_step_without_sequences_does_nothing():
    manager = new_manager()
    for call in (manager.extend, manager.commit):
        call([], [])
        call([])
    manager.release([])
    assert manager.lengths([]).tolist() == []
    assert manager.take_moves() == []


def test_ids_of_other_types_that_are_the_same_bytes_are_other_ids():
    manager = new_manager()
    for n in (1, 2, 3):
        manager.admit(range(n))
    assert manager.lengths(np.array([1, 2], np.int32)).tolist() == [2, 3]
    with refused(manager, ValueError, f"sequence {2**33 + 1} does not exist"):
        manager.lengths(np.array([1, 2], np.int32).view(np.int64))
