"""Each slot's scale goes to its key's lane, for page sizes below, at and above a register's width."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from paged_kernels._src.attention.tpu.scales import pages_per_register, spread_scales
from paged_kernels._src.integers import cdiv, round_up
from paged_kernels._src.tpu.registers import LANES


@pytest.mark.parametrize(
    ("page_size", "pages", "kv_heads", "kinds"),
    [(4, 3, 1, 2), (16, 8, 3, 2), (16, 11, 8, 1), (64, 3, 2, 2), (128, 2, 10, 1), (256, 2, 1, 2)],
)
def test_each_scale_goes_to_the_lane_of_its_key(page_size, pages, kv_heads, kinds):
    at_once = pages_per_register(page_size)
    held, keys = round_up(pages, at_once), cdiv(pages, at_once) * at_once * page_size
    scales = np.random.default_rng(0).normal(size=(held, kv_heads, round_up(kinds * page_size, LANES)))
    scales[pages:] = np.nan  # the places past the last page belong to no page

    def kernel(pages_ref, out_ref):
        def store(kind, first, values):
            out_ref[kind, :, pl.ds(first, values.shape[1])] = values

        spread_scales(lambda i: pages_ref[i], store, pages=pages, page_size=page_size, kinds=kinds)

    out = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((kinds, kv_heads, keys), jnp.float32), interpret=True)(
        scales.astype(np.float32)
    )
    for kind in range(kinds):
        of_slots = scales[:pages, :, kind * page_size : (kind + 1) * page_size].astype(np.float32)
        expected = of_slots.transpose(1, 0, 2).reshape(kv_heads, -1)
        np.testing.assert_array_equal(out[kind, :, : pages * page_size], expected)
