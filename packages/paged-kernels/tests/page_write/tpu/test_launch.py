"""The kernel of the page write, interpreted at its strictest, against a plain double loop, bit for bit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import Mesh, PartitionSpec
from page_write_data import (
    TOKENS,
    WRITES,
    assert_written,
    finite_pages,
    make_batch,
    make_rows,
    noise_pages,
    ragged_writes,
)

from paged_kernels import KVPages, get_backend
from paged_kernels._src.call import Call
from paged_kernels._src.page_write.tpu import launch
from paged_kernels._src.page_write.tpu.launch import WriteSizes, copies_fit
from paged_kernels._src.tpu.interpreter import INTERPRET

DETECT_RACES = dataclasses.replace(INTERPRET, detect_races=True)
EAGER = dataclasses.replace(INTERPRET, dma_execution_mode="eager")
"""Copies as early as possible. A buffer that is used again too soon fails here, but not in the race detector."""


def write_kv_tpu(pages, k, v, batch, *, interpret=INTERPRET):
    """The interpreted kernel, prepared and called as `write_kv` does it, but traced anew in each `jax.jit`."""
    backend = dataclasses.replace(get_backend("tpu_interpret"), interpret=interpret)
    return backend.write(pages, k, v, backend.fit(Call.of_write(k.shape[0], pages, batch)).prepare(batch))


write_jit = jax.jit(write_kv_tpu)


@pytest.fixture
def two_buffers(monkeypatch):
    """Two buffers only, so that the small writes here use each of them many times."""
    monkeypatch.setattr(launch, "MAX_DEPTH", 2)


def check(pages, write, *, write_kv=write_jit, dtype=None, tokens=TOKENS, max_q_len=None):
    (k, v), batch = make_rows(pages, dtype, tokens), make_batch(write, max_q_len=max_q_len)
    assert_written(write_kv(pages, k, v, batch), pages, k, v, batch)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", WRITES)
def test_writes_its_slots_and_no_other_byte(name, kind):
    check(noise_pages(16, kind), WRITES[name])


@pytest.mark.parametrize(
    ("page_size", "kind"),
    [
        (1, "float32"),
        (8, "float32"),
        (24, "aligned"),
        (2, "v_longer"),
        (64, "latent"),
        (16, "latent_int8"),
        (4, "float8_e4m3fn"),
        (32, "float8_e5m2"),
        (64, "int4"),
    ],
)
def test_every_kind_of_row_and_page_size(page_size, kind):
    pages = noise_pages(page_size, kind)
    assert copies_fit(pages)
    check(pages, WRITES["gaps"], dtype="float32")  # rounded to the type of the pages


@settings(max_examples=12, deadline=None, derandomize=True)
@given(write=ragged_writes())
def test_any_batch(write):
    check(noise_pages(16, "bfloat16"), write)


@pytest.mark.parametrize(("page_size", "kind"), [(1, "bfloat16"), (2, "int8"), (12, "float32"), (24, "int4")])
def test_page_sizes_that_no_copy_can_move(page_size, kind):
    pages = finite_pages(page_size, kind)
    assert not copies_fit(pages)
    check(pages, WRITES["gaps"])


@pytest.mark.parametrize(("page_size", "kind"), [(16, "bfloat16"), (64, "float32"), (64, "int8")])
def test_decode_touches_one_tile_a_sequence(page_size, kind):
    pages = noise_pages(page_size, kind)
    assert WriteSizes.choose(pages, 1).span == 8
    check(pages, WRITES["decode"], tokens=5, max_q_len=1)


def test_the_promise_of_few_rows_changes_nothing():
    check(noise_pages(16, "bfloat16"), WRITES["chunks"], max_q_len=11)


def test_with_64_bit_types_enabled():
    pages, batch = noise_pages(16, "int8"), make_batch(WRITES["chunks"])
    with jax.enable_x64(True):
        k, v = make_rows(pages, "float64")
        got = write_jit(pages, k, v, batch)
        assert_written(got, pages, k, v, batch)


def test_split_over_heads(two_buffers):
    by_head, rows = KVPages.partition_spec("tp"), PartitionSpec(None, "tp")
    sharded = jax.shard_map(
        write_kv_tpu,
        mesh=Mesh(np.array(jax.devices()[:2]), ("tp",)),
        in_specs=(by_head, rows, rows, PartitionSpec()),
        out_specs=by_head,
        check_vma=False,
    )
    check(noise_pages(16, "int8"), WRITES["mixed"], write_kv=jax.jit(sharded))


CASES = [("chunks", "int8"), ("mixed", "bfloat16")]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_no_copy_races_with_another(name, kind, two_buffers, capsys):
    write_and_check(DETECT_RACES, name, kind)
    assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_copies_may_complete_at_once(name, kind, two_buffers):
    write_and_check(EAGER, name, kind)


def write_and_check(interpret, name="chunks", kind="int8"):
    write_kv = jax.jit(functools.partial(write_kv_tpu, interpret=interpret))
    check(noise_pages(16, kind), WRITES[name], write_kv=write_kv)


class TestSizes:
    def test_spans_are_a_tile_for_decode_and_a_page_for_more(self):
        pages = KVPages.shapes(4, 64, 2, 64)
        assert WriteSizes.choose(pages, 1).span == 8
        assert WriteSizes.choose(pages, 12).span == 16
        assert WriteSizes.choose(pages, None).span == 64

    def test_spans_of_pages_with_scales_are_pages_so_that_no_two_write_the_same_scales(self):
        pages = KVPages.shapes(4, 64, 2, 64, "int8")
        assert WriteSizes.choose(pages, 1).span == 8
        assert WriteSizes.choose(pages, 2).span == 64

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
    @pytest.mark.parametrize("max_q_len", [None, 1, 3, 9, 200])
    @pytest.mark.parametrize("page_size", [8, 24, 64, 256])
    def test_a_strip_holds_the_longest_run_wherever_it_starts(self, page_size, max_q_len, dtype):
        pages = KVPages.shapes(2, page_size, 8, 128, dtype)
        sizes = WriteSizes.choose(pages, max_q_len)
        longest = min(max_q_len or page_size, sizes.span)
        assert sizes.strip % sizes.row_tile == 0
        assert sizes.strip >= max(sizes.span, sizes.row_tile - 1 + longest)
        assert page_size % sizes.span == 0
        assert sizes.scale_strip % 128 == 0
        assert sizes.scale_strip >= max(pages.layout.scale_lanes(page_size), 127 + longest)

    def test_huge_pages_are_cut_to_fit(self):
        sizes = WriteSizes.choose(KVPages.shapes(4, 1024, 32, 128, jnp.float32), None)
        assert sizes.depth * (sizes.span + sizes.strip) * 32 * 256 * 4 <= launch.BUFFER_BYTES


class TestRefusals:
    def refuses(self, message, page_size=16, kv_heads=2, dtype="float16"):
        pages = KVPages.zeros(2, page_size, kv_heads, 128, dtype)
        k = jnp.zeros((TOKENS, kv_heads, 128))
        with pytest.raises(NotImplementedError, match=message):
            write_kv_tpu(pages, k, k, make_batch(WRITES["decode"]))

    def test_dtype(self):
        self.refuses(r"pages of float16 cannot be written by the TPU kernel; use float32, bfloat16, int8, .*'xla'")

    def test_huge_pages_with_scales(self):
        self.refuses(r"page_size=512 .* pages of 4194304 bytes; .* at most 2097152", 512, 32, "int8")
