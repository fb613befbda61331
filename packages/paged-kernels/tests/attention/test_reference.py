"""The reference against a dense softmax in float64 on contiguous keys and values, and against torch."""

import jax
import numpy as np
import pytest
from kernel_data import (
    CASES,
    SPECS,
    WORKLOADS,
    assert_lse_close,
    assert_rows_close,
    attend,
    attend_densely,
    make_case,
    token_places,
)

from paged_kernels import AttentionSpec


@pytest.mark.parametrize(("workload", "spec"), CASES)
def test_equals_dense_attention_in_float64(workload, spec):
    with jax.enable_x64(True):
        check(workload, spec, "float64")


@pytest.mark.parametrize("workload", WORKLOADS)
def test_equals_dense_attention_in_float32(workload):
    check(workload, "everything", "float32")


def check(workload, spec, dtype):
    case = make_case(WORKLOADS[workload], spec=SPECS[spec], dtype=dtype)
    out, lse = attend(case.q, case.pages, case.batch, SPECS[spec], backend="reference", return_lse=True)
    expected, expected_lse = attend_densely(case, SPECS[spec])
    assert out.dtype == lse.dtype == dtype
    assert_rows_close(out, expected, dtype)
    assert_lse_close(lse, expected_lse, dtype)


@pytest.mark.parametrize("workload", ["decode", "chunked_prefill", "prefill_mqa", "wide_group"])
def test_equals_torch(workload):
    torch = pytest.importorskip("torch", reason="torch is an oracle of these tests only, and is not installed")
    case = make_case(WORKLOADS[workload])
    with jax.enable_x64(True):
        out = attend(case.q, case.pages, case.batch, AttentionSpec(), backend="reference")
    for seq, row in token_places(case.workload):
        q_len, kv_len = case.workload.q_lens[seq], case.workload.kv_lens[seq]
        q, k, v = (
            torch.from_numpy(np.array(x, np.float64)).transpose(0, 1)
            for x in (case.q[row : row + q_len], case.keys[seq], case.values[seq])
        )
        mask = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        assert_rows_close(out[row : row + q_len], expected.transpose(0, 1).numpy(), "float32")
