"""Every backend that runs here computes the same thing: all workloads and specs against the float64 oracle."""

import pytest
from kernel_data import CASES, SPECS, WORKLOADS, assert_lse_close, assert_rows_close, attend, attend_densely, make_case


@pytest.mark.parametrize(("workload", "spec"), CASES)
def test_xla_equals_dense_attention(workload, spec):
    check("xla", workload, spec, "float32")


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
    check(backend, workload, "everything", dtype)


@pytest.mark.parametrize(
    ("workload", "spec"),
    [("decode", "plain"), ("mixed", "plain"), ("gaps", "everything"), ("decode_mqa", "plain"), ("head_128", "plain")],
)
def test_interpreted_tpu_kernel_equals_dense_attention(workload, spec):
    check("tpu_interpret", workload, spec, "float32")


def check(backend, workload, spec, dtype):
    case = make_case(WORKLOADS[workload], spec=SPECS[spec], dtype=dtype)
    out, lse = attend(case.q, case.pages, case.batch, SPECS[spec], backend=backend, return_lse=True)
    expected, expected_lse = attend_densely(case, SPECS[spec])
    assert out.dtype == dtype
    assert lse.dtype == "float32"
    assert_rows_close(out, expected, dtype)
    assert_lse_close(lse, expected_lse)
