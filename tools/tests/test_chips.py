import pytest
from tpu_costing.chips import LIMITS, chip_named, matrix_limit, memory_limit

PEAK_FLOPS = {"v5e": 197e12, "v5p": 459e12 / 2, "v6e": 918e12, "tpu7x": 2307e12 / 2}


@pytest.mark.parametrize("name", LIMITS)
def test_clock_and_width_give_the_published_peak(name):
    limits = LIMITS[name]
    assert limits.clock * limits.flops_per_cycle == pytest.approx(PEAK_FLOPS[name], rel=0.01)
    assert chip_named(name).name == name


@pytest.mark.parametrize(("chip", "cycles"), [("v5e", 120), ("v6e", 70), ("v5p", 93), ("tpu7x", 39)])
def test_memory_limit_of_a_page_of_eight_heads(chip, cycles):
    assert round(memory_limit(chip, 65536)) == cycles


def test_matrix_limit():
    assert matrix_limit("v6e", 524288 * 3) == 3
