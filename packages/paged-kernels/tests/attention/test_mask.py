"""The mask of single keys, and the ranges of keys that follow from it."""

import jax.numpy as jnp
import numpy as np
import pytest
from kernel_data import SPECS

from paged_kernels import AttentionSpec
from paged_kernels.attention.mask import fully_visible, key_range, visible


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({}, ["111...", "1111..", "11111."]),
        ({"causal": False}, ["11111.", "11111.", "11111."]),
        ({"sliding_window": 2}, [".11...", "..11..", "...11."]),
        ({"sliding_window": 2, "causal": False}, [".1111.", "..111.", "...11."]),
    ],
)
def test_each_row_sees_its_keys(spec, expected):
    t, p = jnp.mgrid[2:5, 0:6]
    sees = visible(AttentionSpec(**spec), t, p, 5)
    assert ["".join(".1"[int(x)] for x in row) for row in sees] == expected


@pytest.mark.parametrize("spec", SPECS)
def test_ranges_of_visible_keys_agree_with_single_keys(spec):
    spec, kv_len = SPECS[spec], 40
    p = np.arange(64)
    for t_lo, t_hi in [(0, 1), (0, 40), (7, 23), (39, 40)]:
        sees = np.array([visible(spec, t, p, kv_len) for t in range(t_lo, t_hi)])
        first, end = key_range(spec, jnp.int32(t_lo), jnp.int32(t_hi), kv_len)
        assert (int(first), int(end)) == (np.flatnonzero(sees.any(0))[0], np.flatnonzero(sees.any(0))[-1] + 1)
        for p_lo, p_hi in [(0, 1), (0, 16), (16, 32), (5, 9), (32, 48)]:
            assert fully_visible(spec, (t_lo, t_hi), (p_lo, p_hi), kv_len) == sees[:, p_lo:p_hi].all()
