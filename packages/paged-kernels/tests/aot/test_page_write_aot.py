"""The page write compiles for every TPU generation, on one chip and on four, and never copies the pages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from paged_kernels import KVPages, RaggedBatch, write_kv

pytestmark = pytest.mark.aot

KV_HEADS, NUM_PAGES, SEQS, PAGES_PER_SEQ = 8, 512, 16, 2048
SHAPES = [
    (head_dim, dtype, page_size)
    for head_dim in (64, 128)
    for dtype in ("bfloat16", "float32")
    for page_size in (16, 64)
]


def arguments(head_dim, dtype, page_size, *, tokens=256, max_q_len=None):
    def of(shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype)

    batch = RaggedBatch(
        page_table=of((SEQS, PAGES_PER_SEQ)),
        kv_lens=of((SEQS,)),
        cu_q_lens=of((SEQS + 1,)),
        num_seqs=of(()),
        max_q_len=max_q_len,
    )
    kv = of((tokens, KV_HEADS, head_dim), dtype)
    return KVPages.shapes(NUM_PAGES, page_size, KV_HEADS, head_dim, dtype), kv, kv, batch


def kv_bytes(pages):
    return int(np.prod(pages.data.shape)) * pages.dtype.itemsize


def write(pages, k, v, batch):
    return write_kv(pages, k, v, batch, backend="tpu")


@pytest.mark.parametrize(("head_dim", "dtype", "page_size"), SHAPES)
def test_compiles_for_one_chip_in_place(target, assert_in_place, head_dim, dtype, page_size):
    args = arguments(head_dim, dtype, page_size)
    assert_in_place(target.compile(write, *args, donate=(0,)), kv_bytes(args[0]))


@pytest.mark.parametrize(("head_dim", "dtype", "page_size"), [(64, "bfloat16", 64), (128, "float32", 16)])
def test_compiles_for_decode_in_place(target, assert_in_place, head_dim, dtype, page_size):
    args = arguments(head_dim, dtype, page_size, tokens=SEQS, max_q_len=1)
    assert_in_place(target.compile(write, *args, donate=(0,)), kv_bytes(args[0]))


@pytest.mark.parametrize(("head_dim", "dtype", "page_size"), SHAPES)
def test_compiles_for_four_chips_in_place(target, assert_in_place, head_dim, dtype, page_size):
    args = arguments(head_dim, dtype, page_size)
    pages, rows = KVPages.partition_spec("tp"), P(None, "tp")
    compiled = target.compile_sharded(write, *args, in_specs=(pages, rows, rows, P()), out_specs=pages, donate=(0,))
    assert_in_place(compiled, kv_bytes(args[0]) // 4)
