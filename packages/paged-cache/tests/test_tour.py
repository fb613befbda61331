import doctest
from pathlib import Path

TOUR = Path(__file__).parents[3] / "docs" / "cache" / "tour.md"


def test_the_tour_runs_as_it_stands():
    results = doctest.testfile(str(TOUR), module_relative=False)
    assert results.attempted > 40
    assert results.failed == 0
