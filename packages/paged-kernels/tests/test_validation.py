"""Every error message; and nothing is written after an error."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_data import SPECS, WORKLOADS, make_case, write

from paged_kernels import (
    AttentionSpec,
    HeadParams,
    KVLayout,
    KVPages,
    RaggedBatch,
    check_batch,
    paged_attention,
    paged_attention_update,
    prepare_batch,
    write_kv,
)

SPEC = SPECS["plain"]


@pytest.fixture(scope="module")
def case():
    return make_case(WORKLOADS["mixed"])


@pytest.fixture(scope="module")
def new(case):
    return case.new_rows(case.keys), case.new_rows(case.values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q[0], r"q \(4, 64\) must be \[tokens, q_heads, head_dim\]"),
        (lambda q: q[:0], r"q \(0, 4, 64\) must be \[tokens, q_heads, head_dim\], without an axis of size 0"),
        (lambda q: q.astype(jnp.int32), "q has dtype int32; it must be one of float32, bfloat16"),
        (lambda q: q.astype(jnp.float8_e4m3fn), "q has dtype float8_e4m3fn; it must be one of"),
        (lambda q: q[..., :32], "q has head_dim 32, but the pages have 64; they must be equal"),
        (lambda q: q[:, :3], "q has 3 heads, which must be a multiple of the 2 KV heads of the pages"),
    ],
)
@pytest.mark.parametrize("attend", [paged_attention, jax.jit(paged_attention)], ids=["eager", "jit"])
def test_queries_that_do_not_fit(case, attend, change, message):
    with pytest.raises(ValueError, match=message):
        attend(change(case.q), case.pages, case.batch, SPEC)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda k, v: (k[0], v), r"k \(2, 64\) must be \[tokens, kv_heads, head_dim\]"),
        (lambda k, v: (k, v.astype(jnp.int8)), "v has dtype int8; it must be one of"),
        (lambda k, v: (k, v[1:]), r"k \(40, 2, 64\) and v \(39, 2, 64\) must have the same number of rows"),
        (lambda k, v: (k, v.astype(jnp.bfloat16)), r"k \(float32\) and v \(bfloat16\) must have the same dtype"),
        (lambda k, v: (k[:, :1], v[:, :1]), r"\(kv_heads, head_dim\) \(1, 64\), but the pages have \(2, 64\)"),
    ],
)
@pytest.mark.parametrize("call", [write_kv, jax.jit(write_kv)], ids=["eager", "jit"])
def test_keys_and_values_that_do_not_fit(case, new, call, change, message):
    before = np.array(case.pages.data)
    with pytest.raises(ValueError, match=message):
        call(case.pages, *change(*new), case.batch)
    np.testing.assert_array_equal(case.pages.data, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": np.zeros((4, 2, 16), np.float32)}, r"float32\[4, 2, 16\]; it must be float32 \[pages, .*, 128\]"),
        ({"data": np.zeros((4, 2, 16, 3), np.float32)}, "build pages with KVPages.zeros or KVPages.from_kv"),
        ({"data": np.zeros((4, 2, 16, 128), np.int8)}, r"pages.data is int8\[4, 2, 16, 128\]; it must be float32"),
        ({"scales": np.zeros((4, 2, 32))}, r"pages.scales is \(4, 2, 32\); for float32 pages it must be None"),
        (
            {"layout": KVLayout.create(64, "int8"), "data": np.zeros((4, 2, 16, 128), np.int8)},
            r"must be \(4, 2, 1, 128\)",
        ),
    ],
)
def test_arrays_that_are_no_pages(case, new, change, message):
    with pytest.raises(ValueError, match=message):
        paged_attention(case.q, dataclasses.replace(case.pages, **change), case.batch, SPEC)
    with pytest.raises(ValueError, match=message):
        write_kv(dataclasses.replace(case.pages, **change), *new, case.batch)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (HeadParams(sinks=np.zeros(3, np.float32)), r"head_params.sinks is float32\[3\]; it must be a floating array"),
        (HeadParams(alibi_slopes=np.zeros(4, np.int32)), r"head_params.alibi_slopes is int32\[4\]"),
    ],
)
def test_head_parameters_that_do_not_fit(case, heads, message):
    with pytest.raises(ValueError, match=message):
        paged_attention(case.q, case.pages, case.batch, SPEC, heads)


@pytest.mark.parametrize(
    ("words", "max_q_len", "message"),
    [
        ((39, 1), 20, "tree_mask has 39 rows; q has 40"),
        ((40, 1), None, "max_q_len=None must be at most 32, because tree_mask has 1 words of 32 bits"),
        ((40, 2), 65, "max_q_len=65 must be at most 64"),
    ],
)
def test_tree_masks_that_do_not_fit(case, words, max_q_len, message):
    batch = dataclasses.replace(case.batch, tree_mask=jnp.zeros(words, jnp.int32), max_q_len=max_q_len)
    with pytest.raises(ValueError, match=message):
        paged_attention(case.q, case.pages, batch, SPEC)


def test_a_write_takes_no_part_of_the_context(case, new):
    batch = dataclasses.replace(case.batch, q_starts=case.batch.kv_lens)
    with pytest.raises(ValueError, match=r"batch.q_starts must be None in a write"):
        write_kv(case.pages, *new, batch)


def test_latent_pages_take_no_values_and_others_need_them(case, new):
    latent = KVPages.zeros(4, 16, 2, 64, "float32", latent=True)
    with pytest.raises(ValueError, match="v must be None for latent pages"):
        write_kv(latent, *new, case.batch)
    with pytest.raises(ValueError, match="v is None, which is only for latent pages"):
        write_kv(case.pages, new[0], None, case.batch)


MALFORMED = [
    ({"num_seqs": 3}, "num_seqs is of type int; it must be an int32 array with 0 axes"),
    ({"kv_lens": [1, 2]}, "kv_lens is of type list; it must be an int32 array with 1 axes"),
    ({"kv_lens": np.zeros(6, np.int64)}, r"kv_lens is int64\[6\]; it must be int32 with 1 axes"),
    ({"page_table": np.zeros(6, np.int32)}, r"page_table is int32\[6\]; it must be int32 with 2 axes"),
    ({"page_table": np.zeros((6, 0), np.int32)}, r"page_table \(6, 0\) must have room for at least one sequence and"),
    ({"kv_lens": np.zeros(5, np.int32)}, "kv_lens has 5 entries; page_table has 6 sequences"),
    ({"cu_q_lens": np.zeros(6, np.int32)}, r"cu_q_lens has 6 entries; it must have seqs \+ 1 = 7"),
]


@pytest.mark.parametrize(("change", "message"), MALFORMED)
def test_malformed_batches(case, new, change, message):
    batch = dataclasses.replace(case.batch, **change)
    with pytest.raises(ValueError, match=message):
        paged_attention(case.q, case.pages, batch, SPEC)
    with pytest.raises(ValueError, match=message):
        write_kv(case.pages, *new, batch)


# The good batch: sequences of (53, 12, 30, 1, 66) tokens with (18, 12, 1, 1, 1) rows, page size 16, 32 pages.
BAD_VALUES = [
    ({"num_seqs": 7}, "num_seqs=7 must lie in 0..6, the most sequences of the batch"),
    ({"num_seqs": -1}, "num_seqs=-1 must lie in 0..6"),
    ({"cu_q_lens": {0: 1}}, r"cu_q_lens\[0\]=1 must be 0"),
    ({"cu_q_lens": {5: 41}}, r"cu_q_lens\[5\]=41 must be at most the 40 rows given"),
    ({"cu_q_lens": {2: 17}}, r"cu_q_lens decreases at sequence 1 \(by 1\); it must not"),
    ({"kv_lens": {3: -1}}, r"kv_lens\[3\]=-1 must not be negative; use 0 for an idle sequence"),
    ({"kv_lens": {1: 11}}, r"kv_lens\[1\]=11 must count the 12 new rows of the sequence too"),
    ({"kv_lens": {4: 81}}, r"kv_lens\[4\]=81 needs 6 pages of 16, but the page table has 5 per sequence"),
    ({"page_table": {(0, 3): 0}}, r"page_table\[0, 3\]=0 must lie in 1..31 \(page 0 is the null page\)"),
    ({"page_table": {(2, 1): 32}}, r"page_table\[2, 1\]=32 must lie in 1..31"),
    ({"page_table": {(4, 0): -1}}, r"page_table\[4, 0\]=-1 must lie in 1..31"),
    ({"max_q_len": 17}, "sequence 0 has 18 rows, more than max_q_len=17"),
]


def altered(batch: RaggedBatch, change) -> RaggedBatch:
    """Returns the batch with some entries changed: `{array: {index: value}}`, or `{field: value}`."""
    for name, what in change.items():
        if not isinstance(what, dict):
            batch = dataclasses.replace(batch, **{name: what if name == "max_q_len" else jnp.int32(what)})
            continue
        for index, value in what.items():
            batch = dataclasses.replace(batch, **{name: getattr(batch, name).at[index].set(value)})
    return batch


@pytest.mark.parametrize(("change", "message"), BAD_VALUES)
def test_values_out_of_range_are_refused_before_anything_is_written(case, new, change, message):
    batch = altered(case.batch, change)
    before = np.array(case.pages.data)
    with pytest.raises(ValueError, match=message):
        check_batch(batch, num_pages=32, page_size=16, tokens=40)
    with pytest.raises(ValueError, match=message):
        write_kv(case.pages, *new, batch)
    with pytest.raises(ValueError, match=message):
        paged_attention(case.q, case.pages, batch, SPEC)
    np.testing.assert_array_equal(case.pages.data, before)


@pytest.mark.parametrize(
    ("page_lists", "kv_lens", "q_lens", "message"),
    [
        (
            [[3], [3]],
            [5, 5],
            [1, 1],
            "sequences 0 and 1 both write slot 4 of page 3; each new row must have a slot of its",
        ),
        ([[3], [4], [5, 3]], [5, 5, 20], [2, 1, 4], r"sequences 0 and 2 both write slot 3 of page 3"),
        ([[3], [], [3]], [9, 0, 4], [7, 2, 4], r"sequences 0 and 2 both write slot 2 of page 3"),
        ([[3, 3]], [20], [20], "sequence 0 writes slot 0 of page 3 twice"),
    ],
)
def test_two_rows_of_one_slot_are_refused_in_a_write(page_lists, kv_lens, q_lens, message):
    batch = RaggedBatch.from_lists(page_lists, kv_lens, q_lens)
    pages, tokens = KVPages.zeros(8, 16, 2, 64, "float32"), sum(q_lens)
    q, rows = jnp.ones((tokens, 4, 64)), jnp.ones((tokens, 2, 64))
    sizes = {"num_pages": 8, "page_size": 16, "tokens": tokens}
    for call in (
        lambda: check_batch(batch, **sizes),
        lambda: write_kv(pages, rows, rows, batch),
        lambda: paged_attention_update(q, rows, rows, pages, batch, SPEC),
        lambda: prepare_batch(batch, pages, SPEC, tokens=tokens, q_heads=4, q_dtype=q.dtype),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    check_batch(batch, **sizes, writes=False)
    paged_attention(q, pages, batch, SPEC)  # which only reads
    read = dataclasses.replace(batch, q_starts=batch.first_positions)
    prepare_batch(read, pages, SPEC, tokens=tokens, q_heads=4, q_dtype=q.dtype)


def test_sequences_may_share_a_page_in_which_they_write_other_slots():
    """Nothing of that is undefined. Rows of gaps and unused sequences have no slot."""
    shared = RaggedBatch.from_lists([[3], [3], [3], [3]], kv_lens=[5, 9, 0, 5], q_lens=[2, 3, 2, 1])
    batch = dataclasses.replace(shared, num_seqs=jnp.int32(3))
    check_batch(batch, num_pages=8, page_size=16, tokens=8)


def test_good_batches_pass_and_what_is_not_in_use_is_ignored():
    for workload in WORKLOADS.values():
        case = make_case(workload)
        check_batch(case.batch, num_pages=workload.num_pages, page_size=workload.page_size, tokens=workload.tokens)


def test_pages_before_the_window_may_be_the_null_page(case, new):
    """Sequence 4 has 66 tokens and computes the last: with a window of 18 it sees 48..65, the pages 3 and 4 of 16."""
    window = AttentionSpec(sliding_window=18)
    gone = altered(case.batch, {"page_table": {(4, 0): 0, (4, 1): 0, (4, 2): 0}})
    expected = paged_attention(case.q, case.pages, case.batch, window, backend="reference")
    for backend in ("reference", "xla"):
        actual = paged_attention(case.q, case.pages, gone, window, backend=backend)
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=2e-5)
    write_kv(case.pages, *new, gone)  # which looks at the pages of the new rows alone
    with pytest.raises(ValueError, match=r"page_table\[4, 0\]=0 must lie in 1..31"):
        paged_attention(case.q, case.pages, gone, AttentionSpec(sliding_window=67))
    seen = altered(gone, {"page_table": {(4, 3): 0}})
    with pytest.raises(ValueError, match=r"page_table\[4, 3\]=0 must lie in 1..31"):
        paged_attention(case.q, case.pages, seen, window)
    with pytest.raises(ValueError, match=r"page_table\[4, 1\]=32 must lie in 1..31"):
        paged_attention(case.q, case.pages, altered(gone, {"page_table": {(4, 1): 32}}), window)


@pytest.mark.parametrize("change", [change for change, _ in BAD_VALUES if "max_q_len" not in change])
def test_traced_values_write_only_to_pages_of_the_table(case, new, change):
    """Inside jit values are not checked. Whatever they are, only pages in the page table are written."""
    batch = altered(case.batch, change)
    written = write(case.pages, *new, batch, backend="xla")
    changed = (np.array(written.data) != np.array(case.pages.data)) & ~np.isnan(written.data)
    pages_changed = set(np.flatnonzero(changed.any(axis=(1, 2, 3))).tolist())
    assert pages_changed <= set(np.asarray(batch.page_table).ravel().tolist()) - {0}
