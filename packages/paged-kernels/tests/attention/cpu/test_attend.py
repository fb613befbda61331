"""The C++ kernels against the float64 oracle, on each instruction set that this processor has."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cpu_targets import TARGETS, in_turns, needs_library, on_target
from hypothesis import strategies as st
from kernel_data import (
    ALL_CASES,
    KV_DTYPES,
    LONG,
    SPECS,
    WORKLOADS,
    assert_equals_oracle,
    assert_rows_close,
    attend,
    attend_densely,
    decode,
    make_case,
    make_named_case,
)
from ragged_cases import any_case

from paged_kernels import get_backend, paged_attention
from paged_kernels._src.attention.block_sizes import BlockSizes

pytestmark = needs_library

SMALL = BlockSizes(q_rows=5, kv_pages=2)
"""With these, sequences have several blocks, and blocks several chunks, which are merged."""


@pytest.mark.parametrize(("names", "target"), in_turns([names for names in ALL_CASES if names[0] != "long"]))
def test_equals_dense_attention(names, target):
    assert_equals_oracle(make_named_case(*names), SPECS[names[2]], backend=on_target(target), block_sizes=SMALL)


MANY_ROWS = [names for names in ALL_CASES[1:] if not names[0].startswith("decode")]


@pytest.mark.parametrize(("names", "target"), in_turns(MANY_ROWS[::2]))
def test_blocks_of_many_rows_equal_dense_attention(names, target):
    """Blocks of more than 16 rows are computed as matrix products."""
    sizes = BlockSizes(q_rows=30, kv_pages=3)
    assert_equals_oracle(make_named_case(*names), SPECS[names[2]], backend=on_target(target), block_sizes=sizes)


@pytest.mark.parametrize(("names", "target"), in_turns(ALL_CASES[1::7]))
def test_default_block_sizes_equal_dense_attention(names, target):
    assert_equals_oracle(make_named_case(*names), SPECS[names[2]], backend=on_target(target))


@pytest.mark.parametrize("spec", ["plain", "window"])
def test_more_than_32k_keys(spec):
    assert_equals_oracle(make_case(LONG, spec=SPECS[spec]), SPECS[spec], backend="cpu")


@pytest.mark.parametrize("workload", ["decode", "mixed"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_types_equal_dense_attention_on_the_rounded_data(workload, dtype):
    case = make_case(WORKLOADS[workload], spec=SPECS["everything"], dtype=dtype, heads="both")
    assert_equals_oracle(case, SPECS["everything"], backend="cpu")


@pytest.mark.parametrize("kv_dtype", [*KV_DTYPES, "float16"])
def test_queries_in_bfloat16_over_pages_of_any_type(kv_dtype):
    case = make_case(WORKLOADS["decode"], dtype="bfloat16", kv_dtype=kv_dtype)
    assert_equals_oracle(case, SPECS["plain"], backend="cpu")


def test_many_short_and_few_long_sequences_split_alike():
    """The default sizes cut a long sequence into chunks for several threads, and no short one."""
    workload = decode(5000, *[20] * 5, page_size=64, pages_per_seq=80, num_pages=90, q_heads=2, kv_heads=2)
    assert_equals_oracle(make_case(workload), SPECS["plain"], backend="cpu")


def test_page_ids_out_of_range_read_nothing_outside():
    case = make_case(WORKLOADS["decode"])
    batch = dataclasses.replace(case.batch, page_table=case.batch.page_table.at[0].set(1 << 30).at[1].set(-(1 << 30)))
    expected, _ = attend_densely(case, SPECS["plain"])
    assert_rows_close(attend(case.q, case.pages, batch, SPECS["plain"], backend="cpu")[2:], expected[2:], "float32")


def test_lengths_that_are_nonsense_stay_inside_the_arrays():
    case = make_case(WORKLOADS["mixed"])
    for field, value in {
        "kv_lens": jnp.full_like(case.batch.kv_lens, 2**31 - 1),
        "cu_q_lens": case.batch.cu_q_lens.at[2].set(-9).at[3].set(2**31 - 1),
        "num_seqs": jnp.int32(2**31 - 1),
    }.items():
        batch = dataclasses.replace(case.batch, **{field: value})
        assert attend(case.q, case.pages, batch, SPECS["plain"], backend="cpu").shape == case.q.shape


def test_rows_before_position_zero_give_zeros():
    """Traced lengths may be less than the number of rows. Without causality, such a row could see every key."""
    case = make_case(WORKLOADS["decode"], heads="both")
    batch = dataclasses.replace(
        case.batch,
        kv_lens=case.batch.kv_lens.at[0].set(2),
        cu_q_lens=case.batch.cu_q_lens.at[1:].set(5),
        num_seqs=jnp.int32(1),
        max_q_len=None,
    )
    out, lse = attend(case.q, case.pages, batch, SPECS["bidirectional"], case.heads, backend="cpu", return_lse=True)
    assert not out[:3].any()
    assert np.isneginf(lse[:3]).all()
    assert np.abs(out[3:5]).min(axis=-1).all()
    assert not out[5:].any()


@pytest.mark.parametrize("target", TARGETS)
def test_a_value_that_is_not_finite_shows(target):
    case = make_case(WORKLOADS["decode"])
    pages = dataclasses.replace(case.pages, data=jnp.full_like(case.pages.data, jnp.nan))
    assert np.isnan(attend(case.q, pages, case.batch, SPECS["plain"], backend=on_target(target))).all()


def test_vmap_is_refused():
    case = make_case(WORKLOADS["decode"])
    with pytest.raises(NotImplementedError, match="backend='cpu' has no vmap; put the sequences into one RaggedBatch"):
        jax.vmap(lambda q: attend(q, case.pages, case.batch, SPECS["plain"], backend="cpu"))(case.q[None])


def test_gradients_are_refused():
    case = make_case(WORKLOADS["decode"])
    with pytest.raises(NotImplementedError, match="backend='cpu' has no gradient; use backend='reference'"):
        jax.grad(lambda q: attend(q, case.pages, case.batch, SPECS["plain"], backend="cpu").sum())(case.q)


def test_float64_is_refused():
    with jax.enable_x64(True):
        case = make_case(WORKLOADS["decode"], dtype="float64")
        with pytest.raises(NotImplementedError, match="q has dtype float64; the cpu backend computes in float32"):
            paged_attention(case.q, case.pages, case.batch, SPECS["plain"], backend="cpu")


def test_an_unknown_target_is_an_error():
    case = make_case(WORKLOADS["decode"])
    with pytest.raises(jax.errors.JaxRuntimeError, match="this processor has no target sse9"):
        attend(case.q, case.pages, case.batch, SPECS["plain"], backend=on_target("sse9"))


def test_runs_in_loops():
    """A call in `scan` and in `while_loop` gives what it gives alone."""
    case = make_case(WORKLOADS["decode"])
    call = functools.partial(attend, pages=case.pages, batch=case.batch, spec=SPECS["plain"], backend="cpu")
    alone = call(case.q)
    scanned = jax.lax.scan(lambda carry, q: (carry, call(q)), 0, jnp.stack([case.q, 2 * case.q]))[1]
    np.testing.assert_array_equal(scanned[0], alone)
    looped = jax.lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, call(case.q) + 0 * s[1]), (0, alone))[1]
    np.testing.assert_array_equal(looped, alone)


@pytest.mark.parametrize("check_vma", [False, True])
def test_runs_on_several_devices_under_shard_map(check_vma):
    case = make_case(WORKLOADS["mixed"], kv_dtype="int8", heads="both")
    mesh = jax.make_mesh((2,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,))
    by_head = jax.sharding.PartitionSpec(None, "tp")
    call = functools.partial(paged_attention, spec=SPECS["everything"], backend=get_backend("cpu"))
    sharded = jax.shard_map(
        lambda q, pages, batch, heads: call(q, pages, batch, head_params=heads),
        mesh=mesh,
        in_specs=(by_head, by_head, jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("tp")),
        out_specs=by_head,
        check_vma=check_vma,
    )
    out = jax.jit(sharded)(case.q, case.pages, case.batch, case.heads)
    assert_rows_close(out, attend_densely(case, SPECS["everything"])[0], "float32")


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(drawn=any_case())
def test_any_ragged_batch(drawn):
    assert_equals_oracle(*drawn, backend="cpu", block_sizes=SMALL)


@pytest.mark.slow
@hypothesis.settings(max_examples=2000, deadline=None)
@hypothesis.given(drawn=any_case(), target=st.sampled_from(TARGETS or ("",)))
def test_many_ragged_batches(drawn, target):
    assert_equals_oracle(*drawn, backend=on_target(target), block_sizes=SMALL)
