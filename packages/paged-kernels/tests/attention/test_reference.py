"""The reference against a dense softmax in float64 on contiguous keys and values, and against torch."""

import jax
import numpy as np
import pytest
from kernel_data import (
    CASES,
    FEATURES,
    SPECS,
    WORKLOADS,
    assert_equals_oracle,
    assert_rows_close,
    attend,
    make_case,
    token_places,
)

from paged_kernels import AttentionSpec


@pytest.mark.parametrize(("workload", "spec"), CASES)
def test_equals_dense_attention_in_float64(workload, spec):
    with jax.enable_x64(True):
        case = make_case(WORKLOADS[workload], spec=SPECS[spec], dtype="float64")
        assert_equals_oracle(case, SPECS[spec], backend="reference")


@pytest.mark.parametrize("workload", FEATURES)
def test_features_equal_dense_attention_in_float64(workload):
    """`test_api.py` tests them with the other types."""
    with jax.enable_x64(True):
        case = make_case(FEATURES[workload], spec=SPECS["everything"], dtype="float64", heads="both")
        assert_equals_oracle(case, SPECS["everything"], backend="reference")


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
