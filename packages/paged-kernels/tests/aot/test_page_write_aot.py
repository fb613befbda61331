"""The page write compiles for every TPU generation, on one chip and on four, and never copies the pages."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from paged_kernels import KVPages, RaggedBatch, write_kv

pytestmark = pytest.mark.aot

CHIPS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
NUM_PAGES, SEQS, PAGES_PER_SEQ = 8192, 16, 2048
LATENT = {"head_dim": 576, "v_head_dim": 512, "latent": True}
CASES = [
    ("bfloat16", 16, 8, {"head_dim": 128}),
    ("bfloat16", 2, 4, {"head_dim": 80}),
    ("bfloat16", 24, 8, {"head_dim": 192, "v_head_dim": 128}),
    ("bfloat16", 64, 4, LATENT),
    ("float32", 1, 4, {"head_dim": 256}),
    ("float32", 64, 8, {"head_dim": 64}),
    ("int8", 16, 8, {"head_dim": 128}),
    ("float8_e4m3fn", 4, 8, {"head_dim": 128}),
    ("float8_e5m2", 128, 4, {"head_dim": 80}),
    ("int4", 16, 8, {"head_dim": 64}),
]
"""Type, page size, KV heads and kind of entry. Each of them meets some of the others."""
DECODE = [("bfloat16", 16, 8, {"head_dim": 128}), ("int8", 64, 4, LATENT)]
SCATTERED = [("bfloat16", 1, 8, {"head_dim": 128}), ("int8", 24, 4, {"head_dim": 64})]


def arguments(dtype, page_size, kv_heads, row, *, tokens=256, max_q_len=None):
    def of(shape, dtype=jnp.int32):
        return jax.ShapeDtypeStruct(shape, dtype)

    batch = RaggedBatch(
        page_table=of((SEQS, PAGES_PER_SEQ)),
        kv_lens=of((SEQS,)),
        cu_q_lens=of((SEQS + 1,)),
        num_seqs=of(()),
        max_q_len=max_q_len,
    )
    pages = KVPages.shapes(NUM_PAGES, page_size, kv_heads, dtype=dtype, **row)
    k, v = (of((tokens, kv_heads, dim), jnp.bfloat16) for dim in (pages.head_dim, pages.v_head_dim))
    return pages, k, None if pages.layout.latent else v, batch


def kv_bytes(pages):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pages))


def write(pages, k, v, batch):
    return write_kv(pages, k, v, batch, backend="tpu")


TURNS = [
    case if turn % len(CHIPS) in (chip, (chip + 2) % len(CHIPS)) else pytest.param(*case, marks=pytest.mark.slow)
    for turn, case in enumerate([(name, case) for case in CASES + SCATTERED for name in CHIPS])
    for chip in [turn // len(CHIPS) % len(CHIPS)]
]
"""Each case on two chips in turn, so that each chip has about five; `slow` has the others."""


@pytest.mark.parametrize(("target", "case"), TURNS, indirect=["target"], ids=str)
def test_compiles_for_one_chip_in_place(target, assert_in_place, case):
    args = arguments(*case)
    assert_in_place(target.compile(write, *args, donate=(0,)), kv_bytes(args[0]))


@pytest.mark.parametrize("case", DECODE, ids=str)
def test_compiles_for_decode_in_place(target, assert_in_place, case):
    args = arguments(*case, tokens=SEQS, max_q_len=1)
    assert_in_place(target.compile(write, *args, donate=(0,)), kv_bytes(args[0]))


@pytest.mark.parametrize(
    "target",
    [chip if chip in ("v4", "v6e") else pytest.param(chip, marks=pytest.mark.slow) for chip in CHIPS],
    indirect=True,
)
@pytest.mark.parametrize("case", [CASES[4], CASES[6]], ids=str)
def test_compiles_for_four_chips_in_place(target, assert_in_place, case):
    args = arguments(*case)
    pages, rows = KVPages.partition_spec("tp"), P(None, "tp")
    compiled = target.compile_sharded(write, *args, in_specs=(pages, rows, rows, P()), out_specs=pages, donate=(0,))
    assert_in_place(compiled, kv_bytes(args[0]) // 4)
