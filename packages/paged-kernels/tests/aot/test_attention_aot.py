"""The attention kernel compiles for every TPU generation, on one chip and on four, and never copies the pages."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from kernel_workloads import HEADS, KV_DTYPES
from pairwise import pairwise

from paged_kernels import (
    AttentionSpec,
    HeadParams,
    KVPages,
    RaggedBatch,
    get_backend,
    paged_attention,
    prepare_batch,
    write_kv,
)

pytestmark = pytest.mark.aot

Q_HEADS, KV_HEADS, NUM_TOKENS, SEQS = 16, 4, 2**17, 16
CHIPS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
SIZES = {  # sizes of K and V, and whether the entry is latent
    "64": (64, 64, False),
    "80": (80, 80, False),
    "96": (96, 96, False),
    "128": (128, 128, False),
    "192": (192, 192, False),
    "256": (256, 256, False),
    "192-128": (192, 128, False),
    "576-512": (576, 512, True),
}
MODES = {"decode": (SEQS, 1), "verify": (64, 4), "tree": (64, 4), "mixed": (192, None)}
"""The rows of q, and the most rows of a sequence."""
FACTORS = {
    "size": list(SIZES),
    "kv_dtype": KV_DTYPES,
    "chip": CHIPS,
    "page_size": (16, 1, 4, 64),
    "mode": list(MODES),
    "heads": list(HEADS),
    "q_dtype": ("bfloat16", "float32"),
    "window": (None, 1024),
    "cap": (None, 30.0),
    "causal": (True, False),
}
ROWS = pairwise(FACTORS)
TWO_CHIPS = pytest.mark.parametrize(
    "target",
    [chip if chip in ("v4", "v6e") else pytest.param(chip, marks=pytest.mark.slow) for chip in CHIPS],
    indirect=True,
)
"""For what does not depend on the generation: the one with the least memory and a newer one. `slow` has the others."""
TUNED = get_backend("tpu").with_block_sizes(q_rows=16, kv_pages=8)
TUNED_MIXED = get_backend("tpu").with_block_sizes(q_rows=64, kv_pages=8)
"""Parts of 256 rows and a separate call for single-row sequences. The default blocks have these too, but compile far
longer."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes and types of one call."""

    size: str = "128"
    q_dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    page_size: int = 16
    heads: str = "plain"
    q_heads: int = Q_HEADS
    kv_heads: int = KV_HEADS
    seqs: int = SEQS
    pages_per_seq: int = 256

    def arguments(self, mode):
        """The shapes of q, the pages, the batch and the head parameters."""
        tokens, max_q_len = MODES[mode]
        tokens = max(tokens, self.seqs)
        k_dim, v_dim, latent = SIZES[self.size]
        batch = RaggedBatch(
            page_table=of((self.seqs, self.pages_per_seq)),
            kv_lens=of((self.seqs,)),
            cu_q_lens=of((self.seqs + 1,)),
            num_seqs=of(()),
            max_q_len=max_q_len,
            tree_mask=of((tokens, 1)) if mode == "tree" else None,
        )
        kv_heads = 1 if latent else self.kv_heads
        num_pages = NUM_TOKENS // self.page_size
        pages = KVPages.shapes(
            num_pages, self.page_size, kv_heads, k_dim, self.kv_dtype, v_head_dim=v_dim, latent=latent
        )
        params = HeadParams(**{name: of((self.q_heads,), jnp.float32) for name in HEADS[self.heads]})
        return of((tokens, self.q_heads, k_dim), self.q_dtype), pages, batch, params


def of(shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype)


def attend(spec, backend="tpu"):
    return lambda q, pages, batch, heads: paged_attention(
        q, pages, batch, spec, heads, backend=backend, return_lse=True
    )


def assert_pages_not_copied(compiled, pages, shards=1):
    kv_bytes = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(pages)) // shards
    assert compiled.memory_analysis().temp_size_in_bytes < kv_bytes // 2


@pytest.mark.parametrize(
    ("target", "row"),
    [pytest.param(row["chip"], row, id="-".join(map(str, row.values()))) for row in ROWS],
    indirect=["target"],
)
def test_features_in_pairs_compile_for_one_chip(target, row):
    spec = AttentionSpec(sliding_window=row["window"], soft_cap=row["cap"], causal=row["causal"])
    names = ("size", "q_dtype", "kv_dtype", "page_size", "heads")
    args = Shape(**{name: row[name] for name in names}).arguments(row["mode"])
    backend = TUNED_MIXED if row["mode"] == "mixed" else "tpu"
    assert_pages_not_copied(target.compile(attend(spec, backend), *args), args[1])


@TWO_CHIPS
@pytest.mark.parametrize(
    ("mode", "shape"),
    [("decode", Shape("64", "float32", "float32")), ("mixed", Shape(page_size=64, kv_dtype="int8", heads="both"))],
    ids=["decode", "mixed"],
)
def test_compiles_for_four_chips(target, mode, shape):
    args = shape.arguments(mode)
    heads = P(None, "tp")
    compiled = target.compile_sharded(
        attend(AttentionSpec(), TUNED),
        *args,
        in_specs=(heads, KVPages.partition_spec("tp"), P(), P("tp")),
        out_specs=(heads, heads),
    )
    assert_pages_not_copied(compiled, args[1], shards=4)


@TWO_CHIPS
@pytest.mark.parametrize(
    ("mode", "shape"),
    [
        ("decode", Shape(q_heads=32, kv_heads=8)),
        ("mixed", Shape("64", q_heads=9, kv_heads=3)),
        ("mixed", Shape(q_heads=32, kv_heads=32)),
    ],
    ids=["gqa", "group_of_3", "mha"],
)
def test_any_ratio_of_heads_compiles(target, mode, shape):
    target.compile(attend(AttentionSpec(), TUNED if mode == "mixed" else "tpu"), *shape.arguments(mode))


@TWO_CHIPS
@pytest.mark.parametrize(
    ("mode", "shape"),
    [("decode", Shape(seqs=256, pages_per_seq=8192)), ("mixed", Shape(seqs=256, pages_per_seq=8192, kv_dtype="int8"))],
    ids=["decode", "mixed"],
)
def test_128k_tokens_for_256_sequences(target, mode, shape):
    """The page table is 8 MB, eight times the scalar memory."""
    args = shape.arguments(mode)
    assert_pages_not_copied(target.compile(attend(AttentionSpec()), *args), args[1])


@TWO_CHIPS
@pytest.mark.parametrize("mode", ["decode", "mixed"])
def test_a_step_of_two_layers_over_one_prepared_batch(target, mode):
    """The write and the attention of both layers compile, and the pages are never copied."""
    q, pages, batch, heads = Shape().arguments(mode)
    rows = of((q.shape[0], KV_HEADS, 128), q.dtype)
    facts = {"tokens": q.shape[0], "q_heads": Q_HEADS, "q_dtype": q.dtype, "head_params": heads}

    def step(q, k, v, pages, batch):
        prepared = prepare_batch(batch, pages, AttentionSpec(), backend=TUNED_MIXED, **facts)
        for _ in range(2):
            pages = write_kv(pages, k, v, prepared)
            q = paged_attention(q, pages, prepared, AttentionSpec())
        return q, pages

    compiled = target.compile(step, q, rows, rows, pages, batch, donate=(3,))
    assert_pages_not_copied(compiled, pages)


def test_each_chip_has_each_feature():
    for chip, name in itertools.product(CHIPS, FACTORS.keys() - {"chip"}):
        assert {row[name] for row in ROWS if row["chip"] == chip} == set(FACTORS[name])
