"""The C++ page write against a plain double loop, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cpu_targets import needs_library
from hypothesis import given, settings
from page_write_data import (
    KINDS,
    WRITES,
    assert_written,
    make_batch,
    make_rows,
    noise_pages,
    ragged_writes,
    written_by_loop,
)

from paged_kernels import KVPages, RaggedBatch, write_kv

pytestmark = needs_library

write_by_cpu = functools.partial(write_kv, backend="cpu")
write_jit = jax.jit(write_by_cpu)


def write_and_check(pages, write, dtype=None):
    (k, v), batch = make_rows(pages, dtype), make_batch(write)
    assert_written(write_jit(pages, k, v, batch), pages, k, v, batch)


@pytest.mark.parametrize("name", WRITES)
def test_writes_its_slots_and_no_other_byte(name):
    write_and_check(noise_pages(16), WRITES[name])


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"float32"}))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_kind_of_entry_from_rows_of_every_type(kind, dtype):
    pages = noise_pages(16, kind)
    for name in ("gaps", "past_the_table", "null_page"):
        write_and_check(pages, WRITES[name], dtype)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(write=ragged_writes())
def test_any_batch(write):
    write_and_check(noise_pages(16), write)


@pytest.mark.parametrize(("page_size", "kind"), [(1, "float32"), (5, "int8")])
def test_any_page_size(page_size, kind):
    write_and_check(noise_pages(page_size, kind), WRITES["gaps"])


def test_a_row_of_zeros_and_one_that_is_not_finite():
    pages = noise_pages(16, "int8")
    k, v = make_rows(pages)
    k = k.at[0].set(0).at[1, 0, 3].set(jnp.nan).at[2, 0, 3].set(-jnp.inf)
    batch = make_batch(WRITES["prefill"])
    got, expected = write_jit(pages, k, v, batch), written_by_loop(pages, k, v, batch)
    np.testing.assert_array_equal(got.scales, expected.scales.view(np.float32))
    finite = np.isfinite(expected.scales.view(np.float32)[..., 0, :16])
    np.testing.assert_array_equal(np.asarray(got.data)[finite], expected.data.view(np.int8)[finite])


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_each_float8_rounds_as_numpy_does(kind):
    """Halves between neighbours, subnormals, and both signs."""
    rows = np.linspace(-500, 500, 24 * 2 * 64).reshape(24, 2, 64).astype(np.float32) ** 3 / 1e5
    rows[:, :, 0] = 448 if kind == "float8_e4m3fn" else 57344  # makes each scale 1
    pages, batch = noise_pages(16, kind), make_batch(WRITES["prefill"])
    got = write_jit(pages, jnp.asarray(rows), jnp.asarray(rows), batch)
    assert_written(got, pages, jnp.asarray(rows), jnp.asarray(rows), batch)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_donated_pages_are_written_in_place(kind):
    pages = noise_pages(16, kind, num_pages=2000)
    args = (pages, *make_rows(pages), make_batch(WRITES["mixed"]))
    memory = jax.jit(write_by_cpu, donate_argnums=0).lower(*args).compile().memory_analysis()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(pages))
    assert memory.alias_size_in_bytes == size
    assert memory.temp_size_in_bytes < size / 100


def test_many_rows_are_split_over_threads():
    tokens = 200
    pages = KVPages.zeros(16, 16, 2, 64, "float32")
    k = jnp.arange(tokens * 2 * 64, dtype=jnp.float32).reshape(tokens, 2, 64)
    batch = RaggedBatch.from_lists([list(range(1, 14))], [tokens], [tokens])
    got = write_jit(pages, k, -k, batch)
    np.testing.assert_array_equal(got.k[:, 1:14].reshape(2, -1, 64)[:, :tokens], k.swapaxes(0, 1))
    np.testing.assert_array_equal(got.v[:, 1:14].reshape(2, -1, 64)[:, :tokens], -k.swapaxes(0, 1))
