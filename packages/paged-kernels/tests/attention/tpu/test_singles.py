"""A mixed batch is split in two: the single-row sequences, and the others."""

import jax.numpy as jnp

from paged_kernels import RaggedBatch
from paged_kernels._src.attention.tpu.singles import take_singles


def test_every_sequence_is_in_one_of_the_two():
    batch = RaggedBatch.from_lists([[1], [2], [3], [4], [5]], kv_lens=[9, 4, 7, 0, 3], q_lens=[1, 3, 0, 1, 1])
    rows, singles, rest = take_singles(batch, 8)
    assert rows.tolist() == [0, 8, 8, 4, 5]
    assert singles.kv_lens.tolist() == [9, 0, 0, 0, 3]
    assert (singles.cu_q_lens.tolist(), singles.max_q_len) == ([0, 1, 2, 3, 4, 5], 1)
    assert rest.kv_lens.tolist() == [0, 4, 7, 0, 0]
    assert (rest.cu_q_lens == batch.cu_q_lens).all()


def test_each_row_keeps_its_tree_mask():
    batch = RaggedBatch.from_lists([[1], [2], [3]], kv_lens=[9, 4, 7], q_lens=[2, 1, 1], max_q_len=2)
    words = jnp.arange(4, dtype=jnp.int32)[:, None]
    singles = take_singles(RaggedBatch(**{**vars(batch), "tree_mask": words}), 4)[1]
    assert singles.tree_mask[1:, 0].tolist() == [2, 3]
