"""EasyDeL's two calls against the float64 oracle, and what they must never do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_data import SPECS, WORKLOADS, Workload, assert_rows_close, attend_densely, decode, make_case

from paged_kernels import AttentionSpec, pallas_paged_attention, pallas_prefill_attention

DECODE = decode(37, 0, 16, 48, 17, 70, tokens=6)


@pytest.mark.parametrize("spec", [AttentionSpec(), AttentionSpec(softmax_scale=0.15), AttentionSpec(soft_cap=1.0)])
def test_decode(spec):
    case = make_case(DECODE)
    out = pallas_paged_attention(
        case.q,
        case.pages.k,
        case.pages.v,
        case.batch.kv_lens,
        case.batch.page_table,
        sm_scale=spec.softmax_scale,
        attn_logits_soft_cap=spec.soft_cap,
    )
    assert out.dtype == case.q.dtype
    assert_rows_close(out, attend_densely(case, spec)[0], "float32")


@pytest.mark.parametrize("pages_per_compute_block", [1, 2, 3, 8])
@pytest.mark.parametrize("pages_per_seq", [5, 7])
def test_any_block_and_any_width_of_the_page_table(pages_per_compute_block, pages_per_seq):
    case = make_case(decode(37, 16, tokens=2, seqs=2, pages_per_seq=pages_per_seq))
    arrays = (case.q, case.pages.k, case.pages.v, case.batch.kv_lens, case.batch.page_table)
    out = pallas_paged_attention(*arrays, pages_per_compute_block=pages_per_compute_block)
    assert_rows_close(out, attend_densely(case, SPECS["plain"])[0], "float32")


def test_interpreted_tpu_kernel_takes_any_block():
    case = make_case(decode(37, 16, tokens=2, seqs=2))
    arrays = (case.q, case.pages.k, case.pages.v, case.batch.kv_lens, case.batch.page_table)
    out = pallas_paged_attention(*arrays, pages_per_compute_block=3, backend="tpu_interpret")
    assert_rows_close(out, attend_densely(case, SPECS["plain"])[0], "float32")


@pytest.mark.parametrize("length", [12, 3, 24, 29])
def test_prefill_chunk_starts_at_the_last_multiple_of_its_size(length):
    """With a chunk of 12, lengths of 12 and 24 fill it. 3 and 29 leave padding, which gives zeros."""
    rows = (length - 1) % 12 + 1
    case = make_case(Workload(kv_lens=(length,), q_lens=(rows,), tokens=12, seqs=1))
    arrays = (case.q, case.pages.k, case.pages.v, jnp.int32(length), case.batch.page_table[0])
    out = jax.jit(pallas_prefill_attention)(*arrays)
    assert_rows_close(out, attend_densely(case, SPECS["plain"])[0], "float32")
    scaled = pallas_prefill_attention(*arrays, sm_scale=0.15)
    assert_rows_close(scaled, attend_densely(case, SPECS["scale"])[0], "float32")


def test_prefill_of_nothing_gives_zeros():
    case = make_case(Workload(kv_lens=(12,), q_lens=(12,), tokens=12, seqs=1))
    out = pallas_prefill_attention(case.q, case.pages.k, case.pages.v, jnp.int32(0), case.batch.page_table[0])
    assert not out.any()


def test_prefill_accumulates_in_float32():
    """A sum of 2,000 equal weights in bfloat16 would stop at 256."""
    length = 2000
    case = make_case(
        Workload(kv_lens=(length,), q_lens=(16,), tokens=16, seqs=1, pages_per_seq=125, num_pages=128), dtype="bfloat16"
    )
    arrays = (case.pages.k, case.pages.v, jnp.int32(length), case.batch.page_table[0])
    out = pallas_prefill_attention(jnp.zeros_like(case.q), *arrays)
    mean = np.repeat(case.values[0].mean(axis=0), 2, axis=0)
    np.testing.assert_allclose(np.asarray(out[-1], np.float64), mean, atol=2**-9)


@pytest.mark.parametrize("option", ["sliding_window", "causal", "bias", "segment_ids"])
@pytest.mark.parametrize("call", [pallas_paged_attention, pallas_prefill_attention])
def test_swallows_no_option(call, option):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
        call(None, None, None, None, None, **{option: None})


@pytest.mark.parametrize("mask_value", [-np.inf, 0.0, -1e8, np.nan])
def test_refuses_mask_values_that_do_not_mask(mask_value):
    case = make_case(WORKLOADS["decode"])
    arrays = (case.q, case.pages.k, case.pages.v, case.batch.kv_lens, case.batch.page_table)
    with pytest.raises(ValueError, match=f"mask_value={mask_value} must be finite and at most -1e9"):
        pallas_paged_attention(*arrays, mask_value=mask_value)


def test_refuses_a_block_of_no_pages():
    case = make_case(WORKLOADS["decode"])
    arrays = (case.q, case.pages.k, case.pages.v, case.batch.kv_lens, case.batch.page_table)
    with pytest.raises(ValueError, match="kv_pages=0 must be at least 1"):
        pallas_paged_attention(*arrays, pages_per_compute_block=0)


def test_refuses_pages_that_differ_and_lengths_beyond_the_table():
    case = make_case(WORKLOADS["decode"])
    q, k, v, lengths, table = case.q, case.pages.k, case.pages.v, case.batch.kv_lens, case.batch.page_table
    with pytest.raises(ValueError, match="must have the same first three axes"):
        pallas_paged_attention(q, k, v[:1], lengths, table)
    with pytest.raises(ValueError, match=r"kv_lens\[1\]=81 needs 6 pages of 16"):
        pallas_paged_attention(q, k, v, lengths.at[1].set(81), table)
    with pytest.raises(ValueError, match=r"kv_lens\[0\]=81 needs 6 pages of 16"):
        pallas_prefill_attention(q, k, v, jnp.int32(81), table[0])


def test_refuses_a_length_that_is_no_integer():
    case = make_case(WORKLOADS["decode"])
    with pytest.raises(ValueError, match="length has dtype float32; it must be an integer"):
        pallas_prefill_attention(case.q, case.pages.k, case.pages.v, jnp.float32(20.7), case.batch.page_table[0])
