"""The rows of the feature tests: every pair is in them, and they are few."""

from pairwise import all_pairs, pairs_of, pairwise

FACTORS = {"size": [1, 2, 3, 4], "kind": ["a", "b", "c"], "flag": [False, True], "other": [False, True]}


def pairs_met(rows, factors):
    return {pair for row in rows for pair in pairs_of(row, factors)}


def test_all_pairs_meet_in_few_rows():
    rows = pairwise(FACTORS)
    assert pairs_met(rows, FACTORS) == set(all_pairs(FACTORS))
    assert len(rows) <= 14  # of 48; at least 12 are needed


def test_what_may_not_meet_does_not_and_all_else_does():
    def allowed(row):
        return not (row.get("size") == 3 and row.get("flag"))

    rows = pairwise(FACTORS, allowed)
    assert all(allowed(row) for row in rows)
    assert pairs_met(rows, FACTORS) == set(all_pairs(FACTORS)) - {(("size", 3), ("flag", True))}


def test_rows_are_the_same_each_time():
    assert pairwise(FACTORS) == pairwise(FACTORS)
