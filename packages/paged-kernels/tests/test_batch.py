import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_data import WORKLOADS, make_case

from paged_kernels import RaggedBatch, pack_tree_masks
from paged_kernels._src.batch import token_rows


@pytest.mark.parametrize("workload", WORKLOADS)
def test_token_rows(workload):
    workload = WORKLOADS[workload]
    rows = token_rows(make_case(workload).batch, workload.tokens)
    expected = []
    for seq, (kv_len, q_len) in enumerate(zip(workload.kv_lens, workload.q_lens, strict=True)):
        expected += [(seq, kv_len - q_len + j if kv_len else -1) for j in range(q_len)]
    expected += [(0, -1)] * (workload.tokens - len(expected))
    assert list(zip(rows.seq.tolist(), rows.position.tolist(), strict=True)) == expected


def test_a_row_before_the_sequence_begins_is_no_token():
    batch = RaggedBatch.from_lists([[1]], kv_lens=[2], q_lens=[4])
    assert token_rows(batch, 4).position.tolist() == [-2, -1, 0, 1]


def test_from_lists_pads_the_table_with_the_null_page():
    batch = RaggedBatch.from_lists([[3, 1], [], [2]], kv_lens=[5, 0, 2], q_lens=[1, 0, 2], max_q_len=2)
    assert batch.page_table.tolist() == [[3, 1], [0, 0], [2, 0]]
    assert batch.cu_q_lens.tolist() == [0, 1, 1, 3]
    assert (int(batch.num_seqs), batch.max_seqs, batch.pages_per_seq, batch.max_q_len) == (3, 3, 2, 2)
    assert {leaf.dtype for leaf in jax.tree.leaves(batch)} == {np.dtype(np.int32)}


def test_from_no_lists_is_an_empty_batch():
    batch = RaggedBatch.from_lists([], kv_lens=[], q_lens=[])
    assert (int(batch.num_seqs), batch.max_seqs, batch.pages_per_seq) == (0, 1, 1)


def test_from_lists_refuses_lists_that_differ():
    with pytest.raises(ValueError, match=r"page_lists \(1\), kv_lens \(2\) and q_lens \(1\) must have one entry"):
        RaggedBatch.from_lists([[1]], kv_lens=[1, 2], q_lens=[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"page_lists": [[1.7]]}, r"page_lists has \[1\.7\], which must be a list of whole numbers"),
        ({"page_lists": [[1, 2.0]]}, r"page_lists has \[1, 2\.0\], which must be a list of whole numbers"),
        ({"page_lists": [[True]]}, r"page_lists has \[True\], which must be a list of whole numbers"),
        ({"page_lists": [["1"]]}, r"page_lists has \['1'\], which must be a list of whole numbers"),
        ({"page_lists": [[[1]]]}, r"page_lists has \[\[1\]\], which must be a list of whole numbers"),
        ({"page_lists": [[2**31]]}, r"page_lists has 2147483648, which must be a whole number below 2\*\*31"),
        ({"page_lists": [[2**70]]}, r"page_lists has .*, which must be a list of whole numbers"),
        ({"kv_lens": [5.5]}, r"kv_lens has \[5\.5\], which must be a list of whole numbers"),
        ({"kv_lens": [-(2**31) - 1]}, r"kv_lens has -2147483649, which must be a whole number below 2\*\*31"),
        ({"q_lens": [0.5]}, r"q_lens has \[0\.5\], which must be a list of whole numbers"),
        ({"page_lists": [[1]] * 2, "kv_lens": [1] * 2, "q_lens": [2**30] * 2}, "the sum of q_lens has 2147483648"),
    ],
)
def test_from_lists_refuses_what_int32_does_not_hold(changes, message):
    with pytest.raises(ValueError, match=message):
        RaggedBatch.from_lists(**({"page_lists": [[1]], "kv_lens": [5], "q_lens": [1]} | changes))


def test_from_lists_takes_numpy_arrays_of_whole_numbers():
    batch = RaggedBatch.from_lists([np.array([1, 2], np.uint8)], np.array([5]), [np.int64(1)])
    assert (batch.page_table.tolist(), batch.cu_q_lens.tolist()) == ([[1, 2]], [0, 1])


def test_max_q_len_is_static():
    batch = RaggedBatch.from_lists([[1]], kv_lens=[1], q_lens=[1], max_q_len=1)
    assert len(jax.tree.leaves(batch)) == 4
    assert jax.jit(lambda b: b)(batch).max_q_len == 1


@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_refuses_a_max_q_len_that_means_nothing(value):
    with pytest.raises(ValueError, match=f"max_q_len={value!r} must be an int of at least 1, or None"):
        RaggedBatch.from_lists([[1]], kv_lens=[1], q_lens=[1], max_q_len=value)


def test_first_positions_are_those_of_the_newest_tokens_unless_given():
    batch = RaggedBatch.from_lists([[1], [2]], kv_lens=[5, 9], q_lens=[2, 1])
    assert batch.first_positions.tolist() == [3, 8]
    part = dataclasses.replace(batch, q_starts=jnp.array([7, -1], jnp.int32))
    rows = token_rows(part, 4)
    assert rows.position.tolist() == [7, 8, -1, -1]
    assert rows.is_token.tolist() == [True, True, True, False]


def test_tree_masks_span_words():
    q_lens = [40, 3]
    sees = np.random.default_rng(0).integers(0, 2, (40, 40))
    words = pack_tree_masks([sees, None], q_lens, tokens=50)
    assert words.shape == (50, 2)
    bits = (words[:, :, None].view(np.uint32) >> np.arange(32, dtype=np.uint32)) & 1
    np.testing.assert_array_equal(bits.reshape(50, 64)[:40, :40], sees)
    np.testing.assert_array_equal(bits.reshape(50, 64)[40:43, :3], np.tri(3))
    assert words[43:].sum() == 0


def test_tree_masks_that_do_not_fit():
    with pytest.raises(ValueError, match=r"masks\[1\] \(2, 2\) must be \[3, 3\]: one row and one column per new token"):
        pack_tree_masks([None, np.ones((2, 2))], [2, 3], tokens=8)
    with pytest.raises(ValueError, match="q_lens sum to 5, more than the 4 tokens"):
        pack_tree_masks([None, None], [2, 3], tokens=4)
