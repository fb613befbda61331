"""The fused call equals the write followed by the attention."""

import jax
import numpy as np
import pytest
from kernel_data import EVERY_WORKLOAD, SPECS, assert_rows_close, attend_densely, make_case

from paged_kernels import paged_attention_update, write_kv

update = jax.jit(paged_attention_update, static_argnames=("spec", "backend"), donate_argnames="pages")
PLAIN = [("mixed", "float32")]
KINDS = [("mixed", "int8"), ("mixed", "float8_e4m3fn"), ("latent", "float32")]


def bits(array):
    host = np.asarray(array)
    return host.view(f"uint{8 * host.dtype.itemsize}")


@pytest.mark.parametrize(
    ("backend", "workload", "kv_dtype"),
    [(backend, *kind) for backend in ("reference", "xla", "tpu_interpret") for kind in PLAIN]
    + [("xla", *kind) for kind in KINDS],
)
def test_attends_the_rows_that_it_writes(backend, workload, kv_dtype):
    case = make_case(EVERY_WORKLOAD[workload], kv_dtype=kv_dtype)
    k, v = case.new_rows(case.given_keys), None if case.pages.layout.latent else case.new_rows(case.given_values)
    # The slots of the new rows hold other data, so that a read before the write shows.
    ones = (jax.tree.map(np.ones_like, x) for x in (k, v))
    stale = write_kv(case.pages, *ones, case.batch, backend="xla")
    out, pages = update(case.q, k, v, stale, case.batch, SPECS["plain"], backend=backend)
    assert_rows_close(out, attend_densely(case, SPECS["plain"])[0], "float32")
    for got, want in zip(jax.tree.leaves(pages), jax.tree.leaves(case.pages), strict=True):
        np.testing.assert_array_equal(bits(got), bits(want))
