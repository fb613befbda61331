"""The fused call equals the write and then the attention."""

import jax
import numpy as np
import pytest
from kernel_data import SPECS, WORKLOADS, assert_rows_close, attend_densely, make_case

from paged_kernels import KVPages, paged_attention_update, write_kv

update = jax.jit(paged_attention_update, static_argnames=("spec", "backend"), donate_argnames="pages")


@pytest.mark.parametrize("backend", ["reference", "xla", "tpu_interpret"])
def test_attends_the_rows_that_it_writes(backend):
    case = make_case(WORKLOADS["mixed"])
    # Every page holds nonsense where the new rows go, so that a read before the write shows.
    stale = KVPages.from_kv(*(np.where(np.isnan(x), 0, x) for x in (case.pages.k, case.pages.v)))
    stale = write_ones(stale, case)
    out, pages = update(
        case.q, case.new_rows(case.keys), case.new_rows(case.values), stale, case.batch, SPECS["plain"], backend=backend
    )
    assert_rows_close(out, attend_densely(case, SPECS["plain"])[0], "float32")
    held = ~np.isnan(case.pages.data)
    np.testing.assert_array_equal(np.asarray(pages.data)[held], np.asarray(case.pages.data)[held])


def write_ones(pages, case):
    ones = np.ones((case.q.shape[0], pages.num_kv_heads, pages.head_dim), np.float32)
    return write_kv(pages, ones, ones, case.batch, backend="xla")
