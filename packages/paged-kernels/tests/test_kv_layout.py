"""Entries of every kind: where K and V lie, and what is lost by storing them."""

import jax.numpy as jnp
import numpy as np
import pytest

from paged_kernels import KVLayout
from paged_kernels._src.kv_layout import LARGEST, quantise, scale_of


def rows(dim, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(7, 3, dim)), jnp.float32)


@pytest.mark.parametrize(
    ("k_dim", "v_dim", "v_start", "lanes", "k_lanes", "v_lanes"),
    [
        (64, 64, 64, 128, (0, 128), (0, 128)),
        (80, 80, 128, 256, (0, 128), (128, 256)),
        (96, 96, 128, 256, (0, 128), (128, 256)),
        (128, 128, 128, 256, (0, 128), (128, 256)),
        (192, 192, 192, 384, (0, 256), (128, 384)),
        (192, 128, 256, 384, (0, 256), (256, 384)),
        (256, 256, 256, 512, (0, 256), (256, 512)),
        (16, 8, 16, 128, (0, 128), (0, 128)),
    ],
)
def test_registers_of_a_row(k_dim, v_dim, v_start, lanes, k_lanes, v_lanes):
    layout = KVLayout.create(k_dim, "bfloat16", v_head_dim=v_dim)
    assert (layout.v_start, layout.lanes) == (v_start, lanes)
    assert (layout.k_lanes, layout.v_lanes) == (slice(*k_lanes), slice(*v_lanes))


def test_latent_row_is_stored_once():
    layout = KVLayout.create(576, "bfloat16", v_head_dim=512, latent=True)
    assert (layout.v_start, layout.lanes, layout.k_lanes, layout.v_lanes) == (0, 640, slice(0, 640), slice(0, 512))
    assert KVLayout.create(576, "int8", v_head_dim=512, latent=True).scales_per_entry == 1


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_int4_fills_registers_of_bytes(head_dim):
    layout = KVLayout.create(head_dim, "int4")
    assert (layout.lanes, layout.storage_lanes, layout.storage_dtype) == (256, 128, jnp.int8)


@pytest.mark.parametrize("sizes", [(64, 64), (80, 80), (192, 128), (6, 10)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_rows_come_back(sizes, dtype):
    layout = KVLayout.create(sizes[0], dtype, v_head_dim=sizes[1])
    k, v = rows(sizes[0]).astype(dtype), rows(sizes[1], seed=1).astype(dtype)
    packed, scales = layout.pack(k, v)
    assert scales is None
    assert packed.shape == (7, 3, layout.lanes)
    assert np.count_nonzero(packed) == np.count_nonzero(k) + np.count_nonzero(v)  # padding is zero
    for have, want in zip(layout.unpack(packed, None), (k, v), strict=True):
        np.testing.assert_array_equal(have, want)


@pytest.mark.parametrize(
    ("dtype", "largest_error"), [("int8", 0.004), ("int4", 0.072), ("float8_e4m3fn", 0.036), ("float8_e5m2", 0.072)]
)
@pytest.mark.parametrize("latent", [False, True])
def test_quantised_rows_come_back_to_half_a_step(dtype, largest_error, latent):
    layout = KVLayout.create(96, dtype, v_head_dim=80, latent=latent)
    k, v = rows(96) * 10.0 ** np.arange(-3, 4)[:, None, None], rows(80, seed=1)
    packed, scales = layout.pack(k, None if latent else v)
    assert packed.dtype == layout.storage_dtype
    assert scales.shape == (7, 3, layout.scales_per_entry)
    for have, want in zip(layout.unpack(packed, scales), (k, k[..., :80] if latent else v), strict=True):
        largest = jnp.abs(k if latent else want).max(axis=-1, keepdims=True)
        assert (jnp.abs(have - want) / largest).max() <= largest_error


@pytest.mark.parametrize("dtype", LARGEST)
def test_largest_magnitude_takes_the_largest_stored_value(dtype):
    x = rows(128) * 1.2345
    scale = scale_of(x, dtype)
    assert scale.dtype == jnp.float32
    np.testing.assert_array_equal(jnp.abs(quantise(x, scale, dtype).astype(jnp.float32)).max(axis=-1), LARGEST[dtype])


@pytest.mark.parametrize("dtype", LARGEST)
def test_rows_of_zeros_and_rows_that_are_not_finite(dtype):
    layout = KVLayout.create(64, dtype)
    k = jnp.zeros((4, 64)).at[1, 3].set(jnp.inf).at[2, 5].set(jnp.nan).at[3, 7].set(1e-42)
    back, _ = layout.unpack(*layout.pack(k, k))
    assert (back[0] == 0).all()
    assert jnp.isnan(back[1:3]).all()  # a row with a NaN cannot become a number
    assert jnp.isfinite(back[3]).all()


@pytest.mark.parametrize("dtype", LARGEST)
def test_many_rows_of_nan_do_not_pass_for_numbers(dtype):
    """XLA's maximum on CPU drops NaN in large arrays."""
    layout = KVLayout.create(64, dtype)
    k = jnp.full((128, 64), jnp.nan)
    assert jnp.isnan(layout.unpack(*layout.pack(k, k))[0]).all()


def test_int4_halves_share_a_byte():
    layout = KVLayout.create(128, "int4")
    k, v = jnp.full((1, 128), -7.0), jnp.full((1, 128), 3.0).at[0, 0].set(7.0)
    packed, _ = layout.pack(k, v)
    assert (int(packed[0, 0]) & 0xFF, int(packed[0, 1]) & 0xFF) == (0x79, 0x39)


def test_refusals():
    with pytest.raises(ValueError, match="head_dim=0 must be at least 1"):
        KVLayout.create(0, "bfloat16")
    with pytest.raises(ValueError, match="v_head_dim=0 must be at least 1"):
        KVLayout.create(8, "bfloat16", v_head_dim=0)
    with pytest.raises(ValueError, match="v_head_dim=9 must be at most head_dim=8: a latent V is the start of K"):
        KVLayout.create(8, "bfloat16", v_head_dim=9, latent=True)
    with pytest.raises(ValueError, match=r"dtype=int32 must be one of float32, bfloat16, .*int4"):
        KVLayout.create(8, "int32")
