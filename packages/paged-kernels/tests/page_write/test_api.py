"""The page write as one scatter against a plain double loop, bit for bit."""

import functools

import jax
import pytest
from hypothesis import given, settings
from page_write_data import (
    KINDS,
    WRITES,
    assert_written,
    finite_pages,
    make_batch,
    make_rows,
    noise_pages,
    ragged_writes,
)

from paged_kernels import write_kv

write_by_xla = functools.partial(write_kv, backend="xla")
write_jit = jax.jit(write_by_xla)


def write_and_check(pages, write, dtype=None):
    (k, v), batch = make_rows(pages, dtype), make_batch(write)
    assert_written(write_jit(pages, k, v, batch), pages, k, v, batch)


@pytest.mark.parametrize("name", WRITES)
def test_writes_its_slots_and_no_other_byte(name):
    write_and_check(noise_pages(16), WRITES[name])


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"float32"}))
def test_every_kind_of_row(kind):
    pages = (noise_pages if KINDS[kind]["dtype"].startswith("int") else finite_pages)(16, kind)
    for name in ("gaps", "past_the_table", "null_page"):
        write_and_check(pages, WRITES[name])


@settings(max_examples=50, deadline=None, derandomize=True)
@given(write=ragged_writes())
def test_any_batch(write):
    write_and_check(noise_pages(16), write)


@pytest.mark.parametrize(("page_size", "kind"), [(1, "float32"), (5, "int8")])
def test_any_page_size(page_size, kind):
    write_and_check(noise_pages(page_size, kind), WRITES["gaps"])


def test_rows_are_rounded_to_the_pages_dtype():
    write_and_check(finite_pages(16, "bfloat16"), WRITES["chunks"], dtype="float32")


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_donated_pages_are_written_in_place(kind):
    pages = noise_pages(16, kind, num_pages=2000)
    args = (pages, *make_rows(pages), make_batch(WRITES["mixed"]))
    memory = jax.jit(write_by_xla, donate_argnums=0).lower(*args).compile().memory_analysis()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(pages))
    assert memory.alias_size_in_bytes == size
    assert memory.temp_size_in_bytes < size / 100
