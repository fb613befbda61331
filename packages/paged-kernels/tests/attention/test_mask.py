"""The mask of single keys, and the ranges of keys that follow from it."""

import jax.numpy as jnp
import numpy as np
import pytest
from kernel_data import SPECS

from paged_kernels import AttentionSpec
from paged_kernels._src.attention.mask import fully_visible, in_tree, key_range, visible


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
        last = max(0, t_hi - 1 - (spec.sliding_window or 0))  # the last key before the last row's window
        for p_lo, p_hi in [(0, 1), (0, 16), (16, 32), (5, 9), (32, 48), (last, last + 1), (last + 1, last + 2)]:
            assert fully_visible(spec, (t_lo, t_hi), (p_lo, p_hi), kv_len) == sees[:, p_lo:p_hi].all()


@pytest.mark.parametrize("words", [1, 2, 3])
def test_each_bit_of_a_tree_mask_is_a_new_token(words):
    bits = np.random.default_rng(0).random((5, 32 * words)) < 0.5
    bits[0], bits[1] = True, False  # the sign bit too
    packed = np.packbits(bits, axis=1, bitorder="little").view("<i4")
    sees = in_tree([packed[:, index : index + 1] for index in range(words)], 7, np.arange(7 + 32 * words + 9)[None])
    assert np.array_equal(sees[:, :7], np.ones((5, 7), bool))
    assert np.array_equal(sees[:, 7 : 7 + 32 * words], bits)
    assert not sees[:, 7 + 32 * words :].any()


@pytest.mark.parametrize("spec", ["plain", "window", "bidirectional", "everything"])
def test_ranges_of_visible_keys_agree_with_single_keys_of_a_tree(spec):
    """For any bits: rows 20 to 22 see no key outside the range. If all keys are said to be visible, they are."""
    spec, kv_len, first_new = SPECS[spec], 23, 20
    t, p = jnp.arange(first_new, kv_len)[:, None], jnp.arange(32)[None]
    sees = {bit: np.array(visible(spec, t, p, kv_len, in_tree([-bit + 0 * t], first_new, p))) for bit in (0, 1)}
    first, end = key_range(spec, jnp.int32(first_new), jnp.int32(kv_len), kv_len, tree=True)
    assert (int(first), int(end)) == (np.flatnonzero(sees[1].any(0))[0], np.flatnonzero(sees[1].any(0))[-1] + 1)
    for p_lo, p_hi in [(0, 16), (4, 20), (16, 32), (16, 21), (20, 22)]:
        claimed = fully_visible(spec, (first_new, kv_len), (p_lo, p_hi), kv_len, first_new)
        assert claimed == sees[0][:, p_lo:p_hi].all()
