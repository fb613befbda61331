"""Pages joined into larger pages hold the same keys at the same positions."""

import jax.numpy as jnp
import numpy as np
import pytest

from paged_kernels import KVPages, RaggedBatch
from paged_kernels._src.attention.tpu.enlarge_pages import enlarge, native_page_size


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        ("float32", {1: 1, 2: 2, 3: 24, 4: 4, 8: 8, 12: 24, 16: 16, 24: 24}),
        ("bfloat16", {1: 16, 2: 2, 8: 8, 12: 48, 16: 16, 48: 48}),
        ("int8", {1: 32, 2: 32, 4: 4, 16: 16, 32: 32, 64: 64, 96: 384, 128: 128}),
        ("int4", {2: 32, 4: 4}),
    ],
)
def test_native_page_sizes(dtype, sizes):
    assert {size: native_page_size(KVPages.shapes(2, size, 1, 64, dtype)) for size in sizes} == sizes


@pytest.mark.parametrize(("dtype", "page_size"), [("bfloat16", 1), ("float32", 3), ("float8_e5m2", 2)])
def test_groups_hold_the_same_keys_in_order(dtype, page_size):
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.normal(size=(2, 9, page_size, dim)), jnp.float32) for dim in (16, 8))
    pages = KVPages.from_kv(k, v, dtype)
    batch = RaggedBatch.from_lists([[3, 1, 8, 2, 7], [5]], kv_lens=[5 * page_size, 1], q_lens=[1, 1])
    grouped, of_groups = enlarge(pages, batch)
    assert grouped.page_size == native_page_size(grouped)
    for seq, used in enumerate([5, 1]):
        page_table, groups = batch.page_table[seq, :used], of_groups.page_table[seq]
        for have, want in ((grouped.k, pages.k), (grouped.v, pages.v)):
            keys = want[:, page_table].reshape(2, used * page_size, -1)
            np.testing.assert_array_equal(have[:, groups].reshape(2, -1, keys.shape[2])[:, : keys.shape[1]], keys)
