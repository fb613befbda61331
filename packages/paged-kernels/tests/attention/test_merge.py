"""Attention over parts of the keys, merged, equals attention over all of them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from kernel_data import SPECS, WORKLOADS, assert_lse_close, assert_rows_close, attend, attend_densely, make_case

from paged_kernels import RaggedBatch, merge_attention_states


def context_part(batch: RaggedBatch, first_page: int, pages: int, page_size: int) -> RaggedBatch:
    """The batch over some of each sequence's pages, with row positions counted from the first of these pages."""
    start = first_page * page_size
    table = jnp.pad(batch.page_table, ((0, 0), (0, pages)))[:, first_page : first_page + pages]
    return dataclasses.replace(
        batch,
        page_table=table,
        kv_lens=jnp.clip(batch.kv_lens - start, 0, pages * page_size),
        q_starts=batch.first_positions - start,
    )


@pytest.mark.parametrize("backend", ["reference", "xla"])
@pytest.mark.parametrize("spec", ["plain", "everything", "bidirectional"])
@pytest.mark.parametrize("workload", ["mixed", "decode"])
def test_parts_of_the_context_merge_to_the_whole(workload, spec, backend):
    case = make_case(WORKLOADS[workload], spec=SPECS[spec])
    parts = [context_part(case.batch, first, pages, 16) for first, pages in ((0, 1), (1, 2), (3, 2))]
    results = [attend(case.q, case.pages, part, SPECS[spec], backend=backend, return_lse=True) for part in parts]
    out, lse = merge_attention_states(*(jnp.stack(of) for of in zip(*results, strict=True)))
    expected, expected_lse = attend_densely(case, SPECS[spec])
    assert_rows_close(out, expected, "float32")
    assert_lse_close(lse, expected_lse)


def test_parts_with_no_key_weigh_nothing():
    out, lse = merge_attention_states(jnp.array([[[[5.0]]], [[[0.0]]]]), jnp.array([[[2.0]], [[-jnp.inf]]]))
    assert (out.tolist(), lse.tolist()) == ([[[5.0]]], [[2.0]])
    out, lse = merge_attention_states(jnp.zeros((2, 1, 1, 3)), jnp.full((2, 1, 1), -jnp.inf))
    assert (np.asarray(out) == 0).all()
    assert np.isneginf(lse).all()


def test_keeps_the_type_of_the_outputs():
    out, lse = merge_attention_states(jnp.ones((2, 1, 1, 3), jnp.bfloat16), jnp.zeros((2, 1, 1)))
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)


def test_shapes_that_do_not_belong_together():
    with pytest.raises(
        ValueError, match=r"outputs \(2, 1, 1, 3\) must be \[parts, tokens, q_heads, dim\], and lses \(2, 1\) the same"
    ):
        merge_attention_states(jnp.ones((2, 1, 1, 3)), jnp.ones((2, 1)))
