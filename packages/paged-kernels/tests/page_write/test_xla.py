"""The page write in XLA against a plain double loop, bit for bit."""

import jax
import pytest
from hypothesis import given, settings
from page_write_data import WRITES, assert_written, finite_pages, make_batch, make_rows, nan_pages, ragged_writes

from paged_kernels.page_write.xla import write_kv_xla

write_jit = jax.jit(write_kv_xla)


@pytest.mark.parametrize("name", WRITES)
def test_writes_its_slots_and_no_other_byte(name):
    pages, (k, v), batch = nan_pages(16, "float32"), make_rows("float32"), make_batch(WRITES[name])
    assert_written(write_jit(pages, k, v, batch), pages, k, v, batch)


@pytest.mark.parametrize("name", WRITES)
def test_bfloat16(name):
    pages, (k, v), batch = finite_pages(16, "bfloat16"), make_rows("bfloat16"), make_batch(WRITES[name])
    assert_written(write_jit(pages, k, v, batch), pages, k, v, batch)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(write=ragged_writes())
def test_any_batch(write):
    pages, (k, v), batch = nan_pages(16, "float32"), make_rows("float32"), make_batch(write)
    assert_written(write_jit(pages, k, v, batch), pages, k, v, batch)


@pytest.mark.parametrize("page_size", [1, 5, 64])
def test_any_page_size(page_size):
    pages, (k, v), batch = nan_pages(page_size, "float32"), make_rows("float32"), make_batch(WRITES["gaps"])
    assert_written(write_jit(pages, k, v, batch), pages, k, v, batch)


def test_rows_are_rounded_to_the_pages_dtype():
    pages, (k, v), batch = finite_pages(16, "bfloat16"), make_rows("float32"), make_batch(WRITES["chunks"])
    assert_written(write_jit(pages, k, v, batch), pages, k, v, batch)


def test_donated_float32_pages_are_written_in_place():
    pages, (k, v), batch = nan_pages(16, "float32", num_pages=2000), make_rows("float32"), make_batch(WRITES["mixed"])
    memory = jax.jit(write_kv_xla, donate_argnums=0).lower(pages, k, v, batch).compile().memory_analysis()
    assert memory.alias_size_in_bytes == pages.data.nbytes
    assert memory.temp_size_in_bytes < pages.data.nbytes / 100
