"""The harness of the mutants: what it edits, what it refuses, and what counts as seen."""

from pathlib import Path

import pytest
from mutants import Mutant, assert_seen, planted

FOLDER = Path(__file__).parent
PASSES = "test_mutants.py::test_one_and_one"


def add(a, b):
    return a + b


class Adder:
    @property
    def one_and_one(self):
        return add(1, 1)

    @classmethod
    def two_and_one(cls):
        return add(2, 1)


def test_one_and_one():
    assert add(1, 1) == 2


def test_the_original_is_back_afterwards():
    with planted(Mutant(add, "a + b", "a - b", PASSES)):
        assert add(1, 1) == 0
    assert add(1, 1) == 2


@pytest.mark.parametrize(("function", "old"), [(Adder.one_and_one, "1, 1"), (Adder.two_and_one, "2, 1")])
def test_edits_what_lies_below_a_decorator(function, old):
    with planted(Mutant(function, old, "5, 5", PASSES)):
        assert 10 in (Adder().one_and_one, Adder.two_and_one())


def test_text_that_is_not_there_once_is_refused():
    with (
        pytest.raises(ValueError, match="'a' occurs 3 times in add, it must occur once"),
        planted(Mutant(add, "a", "b", PASSES)),
    ):
        pass


def test_closures_are_refused():
    def closure():
        return PASSES, add, local

    local = 1
    with (
        pytest.raises(ValueError, match="closure must be one function that is no closure"),
        planted(Mutant(closure, "add", "PASSES", PASSES)),
    ):
        pass


def test_a_fault_that_a_test_fails_on_is_seen():
    assert_seen(Mutant(add, "a + b", "a - b", PASSES), FOLDER)


def test_a_fault_that_no_test_fails_on_is_not():
    with pytest.raises(AssertionError, match=r"test_one_and_one pass with 'a \* b \* 2' in place of 'a \+ b'"):
        assert_seen(Mutant(add, "a + b", "a * b * 2", PASSES), FOLDER)


def test_an_edit_that_does_not_run_is_no_fault():
    with pytest.raises(ValueError, match="'a / nothing' in place of 'a \\+ b' does not run"):
        assert_seen(Mutant(add, "a + b", "a / nothing", PASSES), FOLDER)


def test_tests_that_pytest_does_not_know_are_refused():
    with pytest.raises(ValueError, match="must be ordinary tests"):
        assert_seen(Mutant(add, "a + b", "a - b", "test_mutants.py::test_nothing"), FOLDER)
