import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged_kernels import KVPages


@pytest.fixture
def kv():
    k, v = np.random.default_rng(0).standard_normal((2, 3, 5, 8, 16)).astype(np.float32)
    return jnp.asarray(k), jnp.asarray(v)


def test_k_and_v_read_as_they_were_given(kv):
    pages = KVPages.from_kv(*kv)
    np.testing.assert_array_equal(pages.k, kv[0])
    np.testing.assert_array_equal(pages.v, kv[1])
    sizes = (pages.num_pages, pages.page_size, pages.num_kv_heads, pages.head_dim, pages.dtype)
    assert sizes == (5, 8, 3, 16, jnp.float32)


def test_zeros():
    pages = KVPages.zeros(4, 16, 2, 64)
    assert pages.k.shape == pages.v.shape == (2, 4, 16, 64)
    assert pages.dtype == jnp.bfloat16
    assert not pages.data.any()


def test_one_page_is_contiguous_and_counted(kv):
    pages = KVPages.from_kv(*kv)
    assert pages.data[0].nbytes == KVPages.bytes_per_page(8, 3, 16, "float32")


def test_scales_are_counted_too():
    pages = KVPages.zeros(2, 16, 4, 128, "int8")
    assert (
        KVPages.bytes_per_page(16, 4, 128, "int8")
        == pages.data[0].nbytes + pages.scales[0].nbytes
        == 4 * (16 * 256 + 512)
    )


def test_take_reads_pages_and_never_outside(kv):
    pages = KVPages.from_kv(*kv)
    taken, scales = jax.jit(KVPages.take)(pages, jnp.array([[2, 1 << 30], [-(1 << 30), 0]]))
    assert scales is None
    np.testing.assert_array_equal(taken, pages.data[jnp.array([[2, 4], [0, 0]])])


def test_put_entries_changes_those_slots_alone(kv):
    pages = KVPages.from_kv(*kv)
    rows = jnp.arange(5 * 3 * 32, dtype=jnp.float32).reshape(5, 3, 32)
    k, v = rows[..., :16], rows[..., 16:]
    ids = jnp.array([2, 0, 4, 5, -1])  # a page, the null page, a page, and two ids of no page
    put = jax.jit(KVPages.put_entries)(pages, ids, jnp.array([1, 1, 7, 1, 1]), k, v)
    expected = np.array(pages.k), np.array(pages.v)
    for whole, new in zip(expected, (k, v), strict=True):
        whole[:, 2, 1], whole[:, 4, 7] = new[0], new[2]
    np.testing.assert_array_equal(put.k, expected[0])
    np.testing.assert_array_equal(put.v, expected[1])


@pytest.mark.parametrize("dtype", ["int8", "int4", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("latent", [False, True])
def test_put_entries_equals_from_kv_where_rows_have_scales(kv, dtype, latent):
    k, v = kv[0], None if latent else kv[1]
    whole = KVPages.from_kv(k, v, dtype)
    pages = KVPages.zeros(5, 8, 3, 16, dtype, latent=latent)
    ids, slots = jnp.repeat(jnp.arange(1, 5), 8), jnp.tile(jnp.arange(8), 4)
    rows = [None if x is None else x[:, 1:].reshape(3, 32, 16).swapaxes(0, 1) for x in (k, v)]
    put = jax.jit(KVPages.put_entries)(pages, ids, slots, *rows)
    assert put.scales.shape == KVPages.shapes(5, 8, 3, 16, dtype, latent=latent).scales.shape
    for have, want in zip(jax.tree.leaves(put), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(have[1:], want[1:])
        assert not np.asarray(have[0], np.float32).any()


def test_put_entries_rounds_to_the_type_of_the_pages():
    pages = KVPages.zeros(2, 8, 1, 2, jnp.bfloat16)
    put = pages.put_entries(jnp.array([1]), jnp.array([0]), jnp.full((1, 1, 2), 1.001), jnp.full((1, 1, 2), 1.0))
    assert put.dtype == jnp.bfloat16
    assert put.k[0, 1, 0, 0] == 1


def test_partition_spec_serves_the_whole_pytree(kv):
    mesh = jax.make_mesh((2, 4), ("dp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = jax.sharding.NamedSharding(mesh, KVPages.partition_spec("tp", "dp"))
    pages = jax.device_put(KVPages.zeros(4, 16, 8, 64, "int8"), sharding)
    assert pages.data.addressable_shards[0].data.shape == (2, 2, 16, 128)
    assert pages.scales.addressable_shards[0].data.shape == (2, 2, 1, 128)


def test_is_a_pytree_of_one_array_that_can_be_replaced(kv):
    pages = KVPages.from_kv(*kv)
    assert len(jax.tree.leaves(pages)) == 1
    np.testing.assert_array_equal(dataclasses.replace(pages, data=2 * pages.data).v, 2 * kv[1])


@pytest.mark.parametrize("name", ["num_pages", "page_size", "num_kv_heads", "head_dim"])
def test_refuses_sizes_below_one(name):
    sizes = {"num_pages": 2, "page_size": 8, "num_kv_heads": 1, "head_dim": 4} | {name: 0}
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        KVPages.zeros(**sizes)


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_refuses_types_that_are_no_floats(dtype):
    with pytest.raises(ValueError, match=f"dtype={dtype} must be one of float32, bfloat16"):
        KVPages.bytes_per_page(8, 1, 4, dtype)


def test_from_kv_refuses_pages_that_differ(kv):
    k, v = kv
    with pytest.raises(ValueError, match=r"\(3, 5, 8, 16\) and v_pages \(3, 5, 4, 16\) must have the same first three"):
        KVPages.from_kv(k, v[:, :, :4])
    with pytest.raises(ValueError, match=r"k_pages \(5, 8, 16\) must be \[kv_heads, pages, page_size, head_dim\]"):
        KVPages.from_kv(k[0], v[0])
    with pytest.raises(ValueError, match=r"k_pages \(float32\) and v_pages \(bfloat16\) must have the same dtype"):
        KVPages.from_kv(k, v.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="dtype=int32 must be one of"):
        KVPages.from_kv(k.astype(jnp.int32), v.astype(jnp.int32))
