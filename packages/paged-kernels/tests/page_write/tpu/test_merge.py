"""Merging rows as bits: every place of a run in a span, and every place of its rows in a strip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from page_write_data import bits

from paged_kernels._src.page_write.tpu.merge import merge_lanes, merge_rows


@jax.jit
def merge_many(old, new, places):
    """The bits of `merge_rows` for each `(first, end, shift)` of `places`."""
    as_bits = jnp.dtype(f"uint{8 * old.dtype.itemsize}")

    def merge(place):
        first, end, shift = place
        merged = merge_rows(old, new, first=first, end=end, shift=shift)
        return jax.lax.bitcast_convert_type(merged, as_bits)

    return jax.lax.map(merge, places)


def random_bits(rng, rows, dtype):
    size = jnp.dtype(dtype).itemsize
    return rng.integers(0, 1 << 8 * size, (rows, 128)).astype(f"uint{8 * size}").view(jnp.dtype(dtype))


@pytest.mark.parametrize(
    ("dtype", "slots", "strip"),
    [
        ("float32", 8, 16),
        ("float32", 16, 16),
        ("bfloat16", 8, 16),
        ("bfloat16", 2, 32),
        ("int8", 8, 32),
        ("int8", 4, 32),
    ],
)
def test_rows_land_in_their_slots_bit_for_bit(dtype, slots, strip):
    rng = np.random.default_rng(0)
    old, new = random_bits(rng, slots, dtype), random_bits(rng, strip, dtype)
    spans = [(0, slots), (0, 1), (1, 2), (slots - 1, slots), (1, max(1, slots - 2)), (2, 2)]
    places = np.array([(first, end, shift) for first, end in spans for shift in range(strip)], np.int32)
    got = np.asarray(merge_many(jnp.asarray(old), jnp.asarray(new), places))
    for result, (first, end, shift) in zip(got, places, strict=True):
        want = bits(old).copy()
        want[first:end] = bits(new)[(np.arange(first, end) - shift) % strip]
        np.testing.assert_array_equal(result, want)


@pytest.mark.parametrize("strip", [128, 256])
def test_scales_land_in_their_lanes_bit_for_bit(strip):
    rng = np.random.default_rng(0)
    old, new = random_bits(rng, 2, "float32"), np.concatenate([random_bits(rng, 2, "float32")] * (strip // 128), axis=1)
    merge = jax.jit(lambda first, end, shift: merge_lanes(old, new, first=first, end=end, shift=shift))
    for first, end, shift in [(0, 128, 0), (5, 9, 3), (127, 128, strip - 1), (16, 32, 77), (4, 4, 1)]:
        want = bits(old).copy()
        want[:, first:end] = bits(new)[:, (np.arange(first, end) - shift) % strip]
        np.testing.assert_array_equal(bits(merge(first, end, shift)), want)
