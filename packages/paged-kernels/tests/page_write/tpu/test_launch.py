"""The kernel of the page write, interpreted at its strictest, against a plain double loop, bit for bit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import Mesh, PartitionSpec
from page_write_data import TOKENS, WRITES, assert_written, make_batch, make_rows, nan_pages, ragged_writes

from paged_kernels import KVPages
from paged_kernels.mosaic import INTERPRET
from paged_kernels.page_write.tpu import kernel, launch
from paged_kernels.page_write.tpu.launch import WriteSizes, write_kv_tpu

write_jit = jax.jit(functools.partial(write_kv_tpu, interpret=True))
DETECT_RACES = dataclasses.replace(INTERPRET, detect_races=True)
EAGER = dataclasses.replace(INTERPRET, dma_execution_mode="eager")
"""Copies as early as they may be; a buffer that is used again too soon shows here, and not to the race detector."""


@pytest.fixture
def two_buffers(monkeypatch):
    """So few that the small writes here use each buffer many times."""
    monkeypatch.setattr(launch, "MAX_DEPTH", 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", WRITES)
def test_writes_its_slots_and_no_other_byte(name, dtype):
    pages, (k, v), batch = nan_pages(16, dtype), make_rows(dtype), make_batch(WRITES[name])
    assert_written(write_jit(pages, k, v, batch), pages, k, v, batch)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(write=ragged_writes())
def test_any_batch(write):
    pages, (k, v), batch = nan_pages(16, "bfloat16"), make_rows("bfloat16"), make_batch(write)
    assert_written(write_jit(pages, k, v, batch), pages, k, v, batch)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("page_size", [8, 24, 64])
def test_other_page_sizes(page_size, dtype):
    pages, (k, v), batch = nan_pages(page_size, dtype), make_rows(dtype), make_batch(WRITES["gaps"])
    assert_written(write_jit(pages, k, v, batch), pages, k, v, batch)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("page_size", [16, 64])
def test_decode_touches_one_tile_a_sequence(page_size, dtype):
    pages, (k, v) = nan_pages(page_size, dtype), make_rows(dtype, tokens=5)
    batch = make_batch(WRITES["decode"], max_q_len=1)
    assert WriteSizes.choose(pages, 1).span == 8
    assert_written(write_jit(pages, k, v, batch), pages, k, v, batch)


@pytest.mark.parametrize(("name", "max_q_len"), [("no_rows", 5), ("chunks", 11)])
def test_the_promise_of_few_rows_changes_nothing(name, max_q_len):
    pages, (k, v) = nan_pages(16, "bfloat16"), make_rows("bfloat16")
    batch = make_batch(WRITES[name], max_q_len=max_q_len)
    assert_written(write_jit(pages, k, v, batch), pages, k, v, batch)


def test_rows_are_rounded_to_the_pages_dtype():
    pages, (k, v), batch = nan_pages(16, "bfloat16"), make_rows("float32"), make_batch(WRITES["chunks"])
    assert_written(write_jit(pages, k, v, batch), pages, k, v, batch)


def test_with_64_bit_types_enabled():
    pages, batch = nan_pages(16, "float32"), make_batch(WRITES["chunks"])
    with jax.enable_x64(True):
        k, v = make_rows("float64")
        got = jax.jit(functools.partial(write_kv_tpu, interpret=True))(pages, k, v, batch)
    assert_written(got, pages, k, v, batch)


def test_split_over_heads(two_buffers):
    pages, (k, v), batch = nan_pages(16, "float32"), make_rows("float32"), make_batch(WRITES["mixed"])
    by_head, rows = KVPages.partition_spec("tp"), PartitionSpec(None, "tp")
    sharded = jax.shard_map(
        functools.partial(write_kv_tpu, interpret=True),
        mesh=Mesh(np.array(jax.devices()[:2]), ("tp",)),
        in_specs=(by_head, rows, rows, PartitionSpec()),
        out_specs=by_head,
        check_vma=False,
    )
    assert_written(jax.jit(sharded)(pages, k, v, batch), pages, k, v, batch)


@pytest.mark.parametrize("name", ["chunks", "mixed"])
def test_no_copy_races_with_another(name, two_buffers, capsys):
    write_and_check(DETECT_RACES, name)
    assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["chunks", "mixed"])
def test_copies_may_complete_at_once(name, two_buffers):
    write_and_check(EAGER, name)


def write_and_check(interpret, name="chunks"):
    pages, (k, v), batch = nan_pages(16, "bfloat16"), make_rows("bfloat16"), make_batch(WRITES[name])
    got = jax.jit(functools.partial(write_kv_tpu, interpret=interpret))(pages, k, v, batch)
    assert_written(got, pages, k, v, batch)


class TestMutations:
    """The tests above can fail: each of these changes to the kernel makes a wrong result."""

    def test_slots_that_are_kept_but_never_read(self, monkeypatch):
        monkeypatch.setattr(kernel.RunCopies, "_keeps_some", lambda self, run: run < 0)
        self.fails(interpret=True)

    def test_rows_one_slot_too_far(self, monkeypatch):
        original = kernel.merge_rows
        monkeypatch.setattr(kernel, "merge_rows", lambda *a, shift, **k: original(*a, shift=shift + 1, **k))
        self.fails(interpret=True)

    def test_merged_before_it_arrives(self, monkeypatch):
        monkeypatch.setattr(kernel.RunCopies, "wait_read", lambda self, run: None)
        self.fails(interpret=True)

    def test_runs_that_share_a_buffer(self, monkeypatch, two_buffers):
        monkeypatch.setattr(kernel.RunCopies, "buffer", lambda self, run: run * 0)
        self.fails(interpret=EAGER)

    def fails(self, interpret):
        with pytest.raises(AssertionError, match="values differ"):
            write_and_check(interpret)


class TestSizes:
    def test_spans_are_a_tile_for_decode_and_a_page_for_more(self):
        pages = nan_pages(64, "bfloat16")
        assert WriteSizes.choose(pages, 1).span == 8
        assert WriteSizes.choose(pages, 12).span == 16
        assert WriteSizes.choose(pages, None).span == 64

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("max_q_len", [None, 1, 3, 9, 200])
    @pytest.mark.parametrize("page_size", [8, 24, 64, 256])
    def test_a_strip_holds_the_longest_run_wherever_it_starts(self, page_size, max_q_len, dtype):
        sizes = WriteSizes.choose(KVPages.zeros(2, page_size, 8, 128, jnp.dtype(dtype)), max_q_len)
        longest = min(max_q_len or page_size, sizes.span)
        assert sizes.strip % sizes.row_tile == 0
        assert sizes.strip >= max(sizes.span, sizes.row_tile - 1 + longest)
        assert page_size % sizes.span == 0

    def test_huge_pages_are_cut_to_fit(self):
        sizes = WriteSizes.choose(KVPages.shapes(4, 1024, 32, 128, jnp.float32), None)
        assert sizes.depth * (sizes.span + sizes.strip) * 32 * 256 * 4 <= launch.BUFFER_BYTES


class TestRefusals:
    def refuses(self, message, page_size=16, head_dim=64, dtype="float32"):
        pages = KVPages.zeros(4, page_size, 2, head_dim, jnp.dtype(dtype))
        k = jnp.zeros((TOKENS, 2, head_dim))
        with pytest.raises(NotImplementedError, match=message):
            write_kv_tpu(pages, k, k, make_batch(WRITES["decode"]), interpret=True)

    def test_page_size(self):
        self.refuses(r"page_size=12 must be a multiple of 8 .* use 16, or backend='xla'", page_size=12)

    def test_dtype(self):
        self.refuses(r"pages of float16 cannot be written .* use float32 or bfloat16", dtype="float16")
