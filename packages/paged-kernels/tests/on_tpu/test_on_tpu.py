"""The compiled kernels on the TPU of this machine: `nox -s tpu` runs these. Elsewhere they are skipped.

Everything else about the kernels is tested in Pallas's interpreter.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_data import CASES, FEATURE_CASES, SPECS, WORKLOADS, assert_equals_oracle, make_case, make_named_case
from kernel_data import write as write_pages

from paged_kernels import KVPages

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(jax.default_backend() != "tpu", reason="no TPU is attached to this machine"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("workload", "spec"), CASES)
def test_attention_equals_dense_attention(workload, spec, dtype):
    case = make_case(WORKLOADS[workload], spec=SPECS[spec], dtype=dtype)
    assert_equals_oracle(case, SPECS[spec], backend="tpu")


@pytest.mark.parametrize("names", FEATURE_CASES, ids="-".join)
def test_features_in_pairs_equal_dense_attention(names):
    assert_equals_oracle(make_named_case(*names), SPECS[names[2]], backend="tpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "float8_e4m3fn", "float8_e5m2", "int4"])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_page_write_equals_the_scatter(workload, dtype):
    case = make_case(WORKLOADS[workload])
    pages = case.pages
    before = KVPages.zeros(pages.num_pages, pages.page_size, pages.num_kv_heads, pages.head_dim, dtype)
    before = jax.tree.map(jnp.ones_like, before)
    shape = (case.q.shape[0], pages.num_kv_heads, pages.head_dim)
    k, v = (jax.random.normal(jax.random.key(seed), shape) for seed in (0, 1))
    written, expected = (write_pages(before, k, v, case.batch, backend=backend) for backend in ("tpu", "xla"))
    for after, want in zip(jax.tree.leaves(written), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(after, np.float32), np.asarray(want, np.float32))
