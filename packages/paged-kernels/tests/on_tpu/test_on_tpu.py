"""The kernels as compiled, on the TPU of this machine: `nox -s tpu` runs these; elsewhere they are left out.

Everything else about the kernels is tested in Pallas's interpreter, beside the sources that these tests share.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_data import CASES, SPECS, WORKLOADS, assert_lse_close, assert_rows_close, attend, attend_densely, make_case
from kernel_data import write as write_pages

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(jax.default_backend() != "tpu", reason="no TPU is attached to this machine"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("workload", "spec"), CASES)
def test_attention_equals_dense_attention(workload, spec, dtype):
    case = make_case(WORKLOADS[workload], spec=SPECS[spec], dtype=dtype)
    out, lse = attend(case.q, case.pages, case.batch, SPECS[spec], backend="tpu", return_lse=True)
    expected, expected_lse = attend_densely(case, SPECS[spec])
    assert_rows_close(out, expected, dtype)
    assert_lse_close(lse, expected_lse, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_page_write_equals_the_scatter(workload, dtype):
    case = make_case(WORKLOADS[workload], dtype=dtype)
    shape = (case.q.shape[0], case.pages.num_kv_heads, case.pages.head_dim)
    k, v = (jax.random.normal(jax.random.key(seed), shape, dtype) for seed in (0, 1))
    before = dataclasses.replace(case.pages, data=jnp.ones_like(case.pages.data))
    written, expected = (write_pages(before, k, v, case.batch, backend=backend) for backend in ("tpu", "xla"))
    np.testing.assert_array_equal(np.asarray(written.data, np.float32), np.asarray(expected.data, np.float32))
