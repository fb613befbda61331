"""Every backend that runs here gives the same result: all workloads and specs against the float64 oracle."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from kernel_data import (
    CASES,
    FEATURE_CASES,
    HEADS,
    KV_DTYPES,
    LONG,
    ONE_FEATURE_CASE,
    SPECS,
    TWO_FEATURE_CASES,
    WORKLOADS,
    Workload,
    assert_equals_oracle,
    assert_lse_close,
    assert_rows_close,
    attend,
    attend_densely,
    make_case,
    make_named_case,
    write,
)
from ragged_cases import any_case

from paged_kernels import AttentionSpec, KVPages, paged_attention
from paged_kernels._src.attention.block_sizes import BlockSizes


def features(ordinary):
    """Parameters for a test: ordinary runs take these cases, the slow session takes all."""
    return [
        pytest.param(names, id="-".join(names), marks=[] if names in ordinary else pytest.mark.slow)
        for names in FEATURE_CASES
    ]


SMALL = BlockSizes(q_rows=5, kv_pages=2)
"""With these, sequences have several blocks and tiles. With the default sizes they have one of each."""


@pytest.mark.parametrize(("workload", "spec"), CASES)
def test_xla_equals_dense_attention(workload, spec):
    assert_equals_oracle(
        make_case(WORKLOADS[workload], spec=SPECS[spec]), SPECS[spec], backend="xla", block_sizes=SMALL
    )


@pytest.mark.parametrize("names", features(TWO_FEATURE_CASES))
def test_features_in_pairs_equal_dense_attention(names):
    assert_equals_oracle(make_named_case(*names), SPECS[names[2]], backend="xla", block_sizes=SMALL)


@pytest.mark.parametrize("names", features(ONE_FEATURE_CASE))
def test_features_of_the_reference(names):
    assert_equals_oracle(make_named_case(*names), SPECS[names[2]], backend="reference")


@pytest.mark.parametrize(
    ("backend", "workload", "dtype"),
    [
        ("reference", "mixed", "bfloat16"),
        ("xla", "decode", "bfloat16"),
        ("xla", "mixed", "bfloat16"),
        ("xla", "prefill_mqa", "float16"),
    ],
)
def test_half_types_equal_dense_attention_on_the_rounded_data(backend, workload, dtype):
    case = make_case(WORKLOADS[workload], spec=SPECS["everything"], dtype=dtype, heads="both")
    assert_equals_oracle(case, SPECS["everything"], backend=backend)


@pytest.mark.parametrize(
    ("backend", "kv_dtype"),
    [
        *(("xla", kv_dtype) for kv_dtype in KV_DTYPES if kv_dtype != "bfloat16"),
        ("tpu_interpret", "float32"),
        ("tpu_interpret", "int8"),
        ("tpu_interpret", "float8_e4m3fn"),
        pytest.param("tpu_interpret", "float8_e5m2", marks=pytest.mark.slow),  # `tpu/test_launch.py` has these two
        pytest.param("tpu_interpret", "int4", marks=pytest.mark.slow),
    ],
)
def test_queries_in_bfloat16_over_pages_of_any_type(backend, kv_dtype):
    case = make_case(WORKLOADS["decode"], dtype="bfloat16", kv_dtype=kv_dtype)
    assert_equals_oracle(case, SPECS["plain"], backend=backend)


@pytest.mark.slow
@pytest.mark.parametrize(("workload", "spec"), [case for case in CASES if case[1] in ("bidirectional", "everything")])
def test_interpreted_tpu_kernel_equals_dense_attention(workload, spec):
    """These two specs together take every branch.

    `tpu/test_launch.py` has each spec, and the plain one for all workloads.
    """
    assert_equals_oracle(make_case(WORKLOADS[workload], spec=SPECS[spec]), SPECS[spec], backend="tpu_interpret")


@pytest.mark.parametrize("names", features(ONE_FEATURE_CASE))
def test_features_of_the_interpreted_tpu_kernel(names):
    sizes = BlockSizes(q_rows=16, kv_pages=2)
    assert_equals_oracle(make_named_case(*names), SPECS[names[2]], backend="tpu_interpret", block_sizes=sizes)


@pytest.mark.parametrize("backend", ["xla", "tpu_interpret"])
@pytest.mark.parametrize("spec", ["plain", "window"])
def test_more_than_32k_keys(spec, backend):
    assert_equals_oracle(make_case(LONG, spec=SPECS[spec]), SPECS[spec], backend=backend)


def test_eager_and_default_backend_equal_the_jitted_reference():
    case = make_case(WORKLOADS["gaps"])
    out, lse = paged_attention(case.q, case.pages, case.batch, SPECS["plain"], return_lse=True)
    assert_rows_close(paged_attention(case.q, case.pages, case.batch, SPECS["plain"]), out, "float64")
    expected, expected_lse = attend_densely(case, SPECS["plain"])
    assert_rows_close(out, expected, "float32")
    assert_lse_close(lse, expected_lse)


def test_partial_outputs_merge_by_their_lse():
    """Attention over all keys is the attention over two disjoint sets of them, weighted by `exp(lse)`."""
    case = make_case(WORKLOADS["decode"])
    halves = []
    for keep in (slice(0, 2), slice(2, None)):  # of the sequence of 70 tokens: the first two pages, and the other pages
        kv_len = {0: 32, 2: 70 - 32}[keep.start]
        table = jnp.zeros_like(case.batch.page_table[5:]).at[0, : -(-kv_len // 16)].set(case.batch.page_table[5, keep])
        batch = dataclasses.replace(
            case.batch,
            page_table=table,
            kv_lens=jnp.array([kv_len], jnp.int32),
            cu_q_lens=jnp.array([0, 1], jnp.int32),
            num_seqs=jnp.int32(1),
        )
        halves.append(paged_attention(case.q[5:], case.pages, batch, SPECS["plain"], return_lse=True))
    weights = np.exp([lse for _, lse in halves])[..., None]
    merged = sum(w * out for w, (out, _) in zip(weights, halves, strict=True)) / weights.sum(axis=0)
    assert_rows_close(merged, attend_densely(case, SPECS["plain"])[0][5:], "float32")


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(any_case())
def test_any_ragged_batch(drawn):
    assert_equals_oracle(*drawn, backend="xla", block_sizes=SMALL)


@pytest.mark.slow
@hypothesis.settings(max_examples=2000, deadline=None)
@hypothesis.given(any_case())
def test_many_ragged_batches(drawn):
    assert_equals_oracle(*drawn, backend="xla", block_sizes=SMALL)


@pytest.mark.slow
@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(any_case())
def test_ragged_batches_of_the_interpreted_tpu_kernel(drawn):
    assert_equals_oracle(*drawn, backend="tpu_interpret", block_sizes=BlockSizes(q_rows=16, kv_pages=2))


specs = st.builds(
    AttentionSpec,
    softmax_scale=st.floats(0.01, 0.5),
    soft_cap=st.none() | st.floats(0.5, 50),
    sliding_window=st.none() | st.integers(1, 90),
    causal=st.booleans(),
)


@hypothesis.settings(max_examples=3, deadline=None, derandomize=True)
@hypothesis.given(spec=specs)
def test_any_spec(spec):
    assert_equals_oracle(make_case(WORKLOADS["mixed"], spec=spec), spec, backend="xla", block_sizes=SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "xla", "tpu_interpret"])
@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(spec=specs, workload=st.sampled_from(["mixed", "decode"]), heads=st.sampled_from(list(HEADS)))
def test_many_specs(backend, spec, workload, heads):
    assert_equals_oracle(make_case(WORKLOADS[workload], spec=spec, heads=heads), spec, backend=backend)


def test_long_sum_in_bfloat16_accumulates_in_float32():
    """2,000 equal keys, with values 1/256 below one. A sum of weights in bfloat16 would stop at 256."""
    workload = Workload(
        kv_lens=(2000,), q_lens=(1,), tokens=1, seqs=1, page_size=16, pages_per_seq=125, num_pages=128, max_q_len=1
    )
    case = make_case(workload, dtype="bfloat16")
    for backend in ("reference", "xla"):
        out = paged_attention(jnp.zeros_like(case.q), case.pages, case.batch, SPECS["plain"], backend=backend)
        mean = np.repeat(case.values[0].mean(axis=0), 2, axis=0)[None]
        np.testing.assert_allclose(np.asarray(out, np.float64), mean, atol=2**-9)


def test_traced_page_ids_out_of_range_read_nothing_outside():
    case = make_case(WORKLOADS["decode"])
    batch = dataclasses.replace(case.batch, page_table=case.batch.page_table.at[0].set(1 << 30).at[1].set(-(1 << 30)))
    expected, _ = attend_densely(case, SPECS["plain"])
    for backend in ("reference", "xla"):
        out = attend(case.q, case.pages, batch, SPECS["plain"], backend=backend)
        assert_rows_close(out[2:], expected[2:], "float32")


@pytest.mark.parametrize("backend", ["reference", "tpu_interpret"])
def test_rows_before_position_zero_give_zeros(backend):
    """Traced lengths may be less than the number of rows. Without causality, such a row could see every key."""
    case = make_case(WORKLOADS["decode"])
    batch = dataclasses.replace(
        case.batch,
        kv_lens=case.batch.kv_lens.at[0].set(2),
        cu_q_lens=case.batch.cu_q_lens.at[1:].set(5),
        num_seqs=jnp.int32(1),
        max_q_len=None,
    )
    out, lse = attend(case.q, case.pages, batch, SPECS["bidirectional"], backend=backend, return_lse=True)
    assert not out[:3].any()
    assert np.isneginf(lse[:3]).all()
    assert np.abs(out[3:5]).min(axis=-1).all()
    assert not out[5:].any()


@pytest.mark.parametrize("backend", ["xla", "tpu_interpret"])
def test_gradients_are_refused_where_there_are_none(backend):
    case = make_case(WORKLOADS["decode"])
    with pytest.raises(NotImplementedError, match=f"backend='{backend}' has no gradient; use backend='reference'"):
        jax.grad(lambda q: attend(q, case.pages, case.batch, SPECS["plain"], backend=backend).sum())(case.q)


def test_gradients_of_the_interpreted_write_are_refused():
    case = make_case(WORKLOADS["decode"])
    k = case.new_rows(case.keys)
    with pytest.raises(NotImplementedError, match="backend='tpu_interpret' has no gradient"):
        jax.grad(lambda k: write(case.pages, k, k, case.batch, backend="tpu_interpret").data.sum())(k)


def test_xla_refuses_float64():
    with jax.enable_x64(True):
        case = make_case(WORKLOADS["decode"], dtype="float64")
        message = "q has dtype float64; the xla backend computes in float32: .* use backend='reference'"
        with pytest.raises(NotImplementedError, match=message):
            paged_attention(case.q, case.pages, case.batch, SPECS["plain"], backend="xla")


def test_pages_split_by_heads_and_pages_place_by_the_one_spec():
    mesh = jax.make_mesh((2, 4), ("dp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    pages = KVPages.zeros(4, 16, 8, 64)
    placed = jax.device_put(pages, jax.NamedSharding(mesh, KVPages.partition_spec("tp", "dp")))
    assert placed.data.addressable_shards[0].data.shape == (2, 2, 16, 128)


def traced(backend, *, return_lse):
    case = make_case(WORKLOADS["decode"])
    call = functools.partial(paged_attention, spec=SPECS["plain"], backend=backend, return_lse=return_lse)
    return jax.make_jaxpr(call)(case.q, case.pages, case.batch)


def test_the_log_sum_exp_is_computed_only_where_it_is_asked_for():
    """`xla` takes no logarithm, and the TPU kernel has one output."""
    assert " log " not in str(traced("xla", return_lse=False))
    assert " log " in str(traced("xla", return_lse=True))
    assert [len(traced("xla", return_lse=asked).out_avals) for asked in (False, True)] == [1, 2]
    kernels = [pallas_calls(traced("tpu_interpret", return_lse=asked).jaxpr) for asked in (False, True)]
    assert kernels == [[1], [2]]


def pallas_calls(jaxpr):
    """The number of outputs of each kernel in a traced function."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            found.append(len(eqn.outvars))
            continue
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            found += pallas_calls(inner) if hasattr(inner, "eqns") else []
    return found
