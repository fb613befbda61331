"""Facts about chips, by the name that a device reports."""

import jax
import pytest

from paged_kernels._src.tpu.chip import CHIPS, SMALLEST, Chip, chip_in_scope


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_every_kind_finds_its_chip(chip):
    for kind in chip.device_kinds:
        assert Chip.from_device_kind(kind) is chip


def test_an_unknown_kind_is_refused():
    with pytest.raises(NotImplementedError, match=r"device_kind='TPU v3' is not a known TPU generation \(v4, v5e"):
        Chip.from_device_kind("TPU v3")


def test_off_tpu_the_smallest_chip_stands_in():
    assert chip_in_scope() is SMALLEST
    assert min(chip.vmem_bytes for chip in CHIPS) == SMALLEST.vmem_bytes


def test_a_default_device_by_platform_name():
    with jax.default_device("cpu"):
        assert chip_in_scope() is SMALLEST
