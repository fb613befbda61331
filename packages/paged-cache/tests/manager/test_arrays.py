import numpy as np

from paged_cache._src.manager.arrays import first_true, least, most, ragged, runs

NOBODY = np.array([], np.int64)


def test_the_first_true_entry():
    assert first_true(np.array([False, True, True])) == 1
    assert first_true(np.array([True])) == 0
    assert first_true(np.array([False])) is first_true(np.array([], bool)) is None


def test_the_smallest_and_the_largest():
    numbers = np.array([3, -1, 7], np.int32)
    assert (least(numbers, if_none=9), most(numbers, if_none=9)) == (-1, 7)
    assert least(NOBODY, if_none=9) == most(NOBODY, if_none=9) == 9


def test_ragged_of_nothing_is_empty():
    rows, columns = ragged(NOBODY, NOBODY, NOBODY)
    assert (rows.tolist(), columns.tolist()) == ([], [])


def test_ragged_leaves_out_who_counts_nothing():
    rows, columns = ragged(np.array([5, 6, 7]), np.array([1, 2, 3]), np.array([1, 0, 1]))
    assert (rows.tolist(), columns.tolist()) == ([5, 7], [1, 3])


def test_runs_without_any():
    assert runs(np.array([5]), np.array([0])).tolist() == []
