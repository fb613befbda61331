"""The xla backend against the dense float64 oracle; it must not read, compile or allocate too much."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from kernel_data import (
    FEATURES,
    SPECS,
    WORKLOADS,
    Workload,
    assert_equals_oracle,
    assert_rows_close,
    attend,
    attend_densely,
    decode,
    make_case,
)

from paged_kernels import AttentionSpec, KVPages, RaggedBatch, get_backend, paged_attention
from paged_kernels._src.attention.block_sizes import BlockSizes
from paged_kernels._src.attention.xla.prepare import default_block_sizes

SMALL = BlockSizes(q_rows=5, kv_pages=2)


def check(workload, spec, *, block_sizes=SMALL, **data):
    assert_equals_oracle(make_case(workload, spec=spec, **data), spec, backend="xla", block_sizes=block_sizes)


@pytest.mark.parametrize(
    "blocks", [None, (1, 1), (3, 4), (64, 3), (4, 100)], ids=lambda b: "default" if b is None else f"{b[0]}x{b[1]}"
)
def test_block_sizes_do_not_matter(blocks):
    sizes = None if blocks is None else BlockSizes(q_rows=blocks[0], kv_pages=blocks[1])
    check(WORKLOADS["mixed"], SPECS["everything"], block_sizes=sizes, heads="both")


@pytest.mark.parametrize("blocks", [(1, 1), (7, 3)], ids=["1x1", "7x3"])
@pytest.mark.parametrize("name", ["wide_tree", "latent", "part_of_context", "page_2"])
def test_block_sizes_do_not_matter_to_other_features(name, blocks):
    sizes = BlockSizes(q_rows=blocks[0], kv_pages=blocks[1])
    check(FEATURES[name], SPECS["window"], block_sizes=sizes, heads="both", kv_dtype="int8")


def test_any_page_size():
    shape = {"page_size": 3, "head_dim": 8, "pages_per_seq": 14, "num_pages": 44}
    check(Workload(kv_lens=(40, 13, 22), q_lens=(9, 1, 22), **shape), SPECS["window"])


@pytest.mark.parametrize("window", range(14, 20))
def test_the_edge_of_the_window(window):
    check(decode(37, 16, 33), AttentionSpec(sliding_window=window), block_sizes=BlockSizes(q_rows=1, kv_pages=1))


def test_rows_at_negative_positions_give_zeros():
    """Refused on the host. Under jit they must not see any key."""
    case = make_case(WORKLOADS["prefill"])
    batch = dataclasses.replace(case.batch, kv_lens=case.batch.kv_lens.at[0].set(10))  # 35 rows, 10 tokens
    spec = AttentionSpec(causal=False)
    out, lse = attend(
        case.q,
        case.pages,
        batch,
        spec,
        backend=dataclasses.replace(get_backend("xla"), block_sizes=SMALL),
        return_lse=True,
    )
    assert (np.asarray(out[:25]) == 0).all()
    assert np.isneginf(lse[:25]).all()
    assert np.isfinite(lse[25:35]).all()


def test_one_compilation_serves_all_lengths():
    step = jax.jit(lambda q, pages, batch: paged_attention(q, pages, batch, AttentionSpec(), backend="xla"))
    shape = {"tokens": 40, "seqs": 6, "pages_per_seq": 5}
    for kv_lens, q_lens in [((35,), (35,)), ((53, 12, 30), (18, 12, 1)), ((), ()), ((70, 0, 1), (1, 0, 1))]:
        case = make_case(Workload(kv_lens=kv_lens, q_lens=q_lens, **shape))
        assert_rows_close(step(case.q, case.pages, case.batch), attend_densely(case, AttentionSpec())[0], "float32")
    assert step._cache_size() == 1


def compile_for(pages_per_seq, num_pages, dtype, max_q_len):
    """Compile the backend, without running it, for 4 sequences and 4 rows of a 2-head model."""
    i32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    pages = KVPages.shapes(num_pages, 16, 2, 64, dtype)
    batch = RaggedBatch(
        page_table=i32(4, pages_per_seq), kv_lens=i32(4), cu_q_lens=i32(5), num_seqs=i32(), max_q_len=max_q_len
    )
    q = jax.ShapeDtypeStruct((4, 4, 64), dtype)
    return attend.lower(q, pages, batch, AttentionSpec(), backend="xla").compile()


@pytest.mark.parametrize("max_q_len", [1, None])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda d: np.dtype(d).name)
def test_memory_does_not_grow_with_the_context_or_the_pool(dtype, max_q_len):
    small, large = (
        compile_for(width, pool, dtype, max_q_len).memory_analysis().temp_size_in_bytes
        for width, pool in [(32, 64), (256, 4096)]
    )
    assert large - small < 64 * 1024  # a copy of the page table, but no page: one sequence's keys are 2 MiB


def test_a_decode_batch_has_the_decode_walk_alone():
    def loops(max_q_len):
        return len(re.findall(r" while\(", compile_for(8, 16, jnp.float32, max_q_len).as_text()))

    assert loops(None) == 2 * loops(1)


@pytest.mark.parametrize("devices", [2, 4])
def test_under_shard_map_by_heads(devices):
    mesh = jax.make_mesh((devices,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,))
    case = make_case(dataclasses.replace(WORKLOADS["mixed"], q_heads=8, kv_heads=4))
    sharded = jax.jit(
        jax.shard_map(
            lambda q, pages, batch: paged_attention(q, pages, batch, AttentionSpec(), backend="xla"),
            mesh=mesh,
            in_specs=(P(None, "tp"), KVPages.partition_spec("tp"), P()),
            out_specs=P(None, "tp"),
            check_vma=False,
        )
    )
    out = sharded(case.q, case.pages, case.batch)
    assert_rows_close(out, attend_densely(case, AttentionSpec())[0], "float32")


def test_with_64_bit_types_enabled():
    with jax.enable_x64(True):
        check(WORKLOADS["mixed"], SPECS["everything"])


def test_eager_calls_are_right_too():
    case = make_case(WORKLOADS["decode_idle_sequences"])
    out = paged_attention(case.q, case.pages, case.batch, AttentionSpec(), backend="xla")
    assert_rows_close(out, attend_densely(case, AttentionSpec())[0], "float32")


@pytest.mark.parametrize(
    ("page_size", "kv_heads", "head_dim", "kv_pages"),
    [(16, 8, 128, 16), (16, 3, 64, 16), (16, 32, 128, 4), (512, 8, 128, 1), (1, 64, 256, 16)],
)
def test_default_block_sizes(page_size, kv_heads, head_dim, kv_pages):
    pages = KVPages.shapes(9, page_size, kv_heads, head_dim)
    assert default_block_sizes(pages) == BlockSizes(q_rows=64, kv_pages=kv_pages)


def test_traced_starts_far_past_the_rows_cost_no_more_than_the_rows():
    """It would loop over 2**24 tiles. The rows that there are get what they get of a sequence that ends with them."""
    case = make_case(WORKLOADS["mixed"])
    step = jax.jit(lambda q, pages, batch: paged_attention(q, pages, batch, AttentionSpec(), backend="xla"))
    pages, positions = jnp.ones((1, 2), jnp.int32), jnp.zeros(1, jnp.int32)
    ends = [
        RaggedBatch(
            page_table=pages,
            kv_lens=jnp.array([32], jnp.int32),
            cu_q_lens=jnp.array([0, end], jnp.int32),
            num_seqs=jnp.int32(1),
            q_starts=positions,
        )
        for end in (case.q.shape[0], 2**30)
    ]
    np.testing.assert_array_equal(*(step(case.q, case.pages, batch) for batch in ends))
