"""Every byte as an operand: all 256 values of each type that needs more than a cast."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from paged_kernels import AttentionSpec, KVLayout
from paged_kernels._src.attention.tpu.config import Config
from paged_kernels._src.attention.tpu.unpack import load_lanes, unit

BYTES = np.tile(np.arange(256, dtype=np.uint8).reshape(1, 2, 128), (3, 8, 1))  # [pages, page_size, storage_lanes]


def config(dtype, q_dtype, reads_e4m3b11=False):
    return Config(
        spec=AttentionSpec(),
        tokens=1,
        kv_heads=1,
        q_per_kv=1,
        layout=KVLayout.create(128 if dtype == "int4" else 64, dtype),
        page_size=16,
        pages_per_seq=3,
        q_rows=1,
        kv_pages=3,
        subblock_pages=3,
        buffers=2,
        q_dtype=jnp.dtype(q_dtype),
        reads_e4m3b11=reads_e4m3b11,
    )


def unpacked(c, lanes):
    """The bytes as operands, times the unit."""

    def kernel(rows, out):
        out[...] = load_lanes(rows, lanes, c)

    shape = jax.ShapeDtypeStruct((48, lanes.stop - lanes.start), c.compute_dtype)
    stored = jnp.asarray(BYTES).view(c.layout.storage_dtype)
    out = pl.pallas_call(kernel, out_shape=shape, interpret=True)(stored)
    return np.asarray(out, np.float64) * unit(c)


@pytest.mark.parametrize("q_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("as_b11", [False, True])
def test_float8_e4m3fn(q_dtype, as_b11):
    """Also if the hardware reads it as another type: subnormals, and both zeros. NaN is never stored."""
    have = unpacked(config("float8_e4m3fn", q_dtype, as_b11), slice(0, 128))
    want = BYTES.view(jnp.float8_e4m3fn).astype(np.float64).reshape(48, 128)
    number = ~np.isnan(want)
    np.testing.assert_array_equal(have[number], want[number])


@pytest.mark.parametrize("q_dtype", ["bfloat16", "float32"])
def test_int4(q_dtype):
    stored = BYTES.view(np.int8).reshape(48, 128)
    want = np.concatenate([(stored << 4) >> 4, stored >> 4], axis=1)
    c = config("int4", q_dtype)
    for lanes in (slice(0, 128), slice(128, 256), slice(0, 256)):
        np.testing.assert_array_equal(unpacked(c, lanes), want[:, lanes])


@pytest.mark.parametrize("dtype", ["int8", "float8_e5m2"])
def test_types_that_are_cast(dtype):
    c = config(dtype, "bfloat16")
    want = BYTES.view(c.layout.storage_dtype).astype(np.float64).reshape(48, 128)
    np.testing.assert_array_equal(unpacked(c, slice(0, 128)), want)
