"""The attention kernel compiles for every TPU generation, on one chip and on four, and never copies the pages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from paged_kernels import AttentionSpec, BlockSizes, KVPages, RaggedBatch, paged_attention

pytestmark = pytest.mark.aot

Q_HEADS, KV_HEADS, NUM_PAGES, SEQS = 16, 4, 2048, 16
SHAPES = [
    (head_dim, dtype, page_size)
    for head_dim in (64, 128)
    for dtype in ("bfloat16", "float32")
    for page_size in (16, 64)
]
MODES = {"decode": (SEQS, 1), "mixed": (192, None)}
EVERYTHING = AttentionSpec(scale=0.1, sliding_window=1024, soft_cap=30.0)
BLOCKS = BlockSizes(q_rows=32, kv_pages=8)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one call."""

    head_dim: int = 128
    dtype: str = "bfloat16"
    page_size: int = 16
    q_heads: int = Q_HEADS
    kv_heads: int = KV_HEADS
    seqs: int = SEQS
    pages_per_seq: int = 256

    def arguments(self, mode):
        tokens, max_q_len = MODES[mode] if self.seqs == SEQS else (self.seqs, 1 if mode == "decode" else None)

        def of(shape, dtype=jnp.int32):
            return jax.ShapeDtypeStruct(shape, dtype)

        batch = RaggedBatch(
            page_table=of((self.seqs, self.pages_per_seq)),
            kv_lens=of((self.seqs,)),
            cu_q_lens=of((self.seqs + 1,)),
            num_seqs=of(()),
            max_q_len=max_q_len,
        )
        pages = KVPages.shapes(NUM_PAGES, self.page_size, self.kv_heads, self.head_dim, self.dtype)
        return of((tokens, self.q_heads, self.head_dim), self.dtype), pages, batch


def attend(spec, block_sizes=None):
    return lambda q, pages, batch: paged_attention(
        q, pages, batch, spec, backend="tpu", block_sizes=block_sizes, return_lse=True
    )


def assert_pages_not_copied(compiled, pages, shards=1):
    kv_bytes = int(np.prod(pages.data.shape)) * pages.dtype.itemsize // shards
    assert compiled.memory_analysis().temp_size_in_bytes < kv_bytes // 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("head_dim", "dtype", "page_size"), SHAPES)
def test_compiles_for_one_chip(target, mode, head_dim, dtype, page_size):
    args = Shape(head_dim, dtype, page_size).arguments(mode)
    assert_pages_not_copied(target.compile(attend(EVERYTHING, BLOCKS), *args), args[1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("head_dim", "dtype", "page_size"), [(64, "float32", 16), (128, "bfloat16", 64)])
def test_compiles_for_four_chips(target, mode, head_dim, dtype, page_size):
    args = Shape(head_dim, dtype, page_size).arguments(mode)
    heads = P(None, "tp")
    compiled = target.compile_sharded(
        attend(AttentionSpec(), BLOCKS),
        *args,
        in_specs=(heads, KVPages.partition_spec("tp"), P()),
        out_specs=(heads, heads),
    )
    assert_pages_not_copied(compiled, args[1], shards=4)


@pytest.mark.parametrize(
    ("mode", "shape"),
    [
        ("decode", Shape(q_heads=32, kv_heads=8)),
        ("mixed", Shape(q_heads=9, kv_heads=3, head_dim=64)),
        ("mixed", Shape(q_heads=32, kv_heads=32)),
    ],
    ids=["gqa", "group_of_3", "mha"],
)
def test_default_block_sizes_compile(target, mode, shape):
    target.compile(attend(AttentionSpec()), *shape.arguments(mode))


@pytest.mark.parametrize("mode", MODES)
def test_128k_tokens_for_256_sequences(target, mode):
    """Fault 9: their page table is 8 MB, eight times the scalar memory."""
    args = Shape(seqs=256, pages_per_seq=8192).arguments(mode)
    assert_pages_not_copied(target.compile(attend(AttentionSpec(), BLOCKS), *args), args[1])
