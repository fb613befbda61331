"""The README's examples run and print what they say."""

import doctest
import pathlib

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_examples():
    results = doctest.testfile(str(README), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert results.attempted >= 9
    assert results.failed == 0
