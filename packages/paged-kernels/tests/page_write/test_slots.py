"""Where rows are stored: the vectorised rule against the definition, one row at a time."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from page_write_data import TOKENS, WRITES, make_batch, noise_pages, ragged_writes

from paged_kernels._src.page_write.slots import row_slots

row_slots_jit = jax.jit(row_slots, static_argnums=2)


def slots_by_loop(pages, batch, tokens):
    places = [(0, None)] * tokens
    starts, kv_lens = batch.cu_q_lens.tolist(), batch.kv_lens.tolist()
    for seq in range(int(batch.num_seqs)):
        for row in range(starts[seq], starts[seq + 1]):
            position = kv_lens[seq] - (starts[seq + 1] - row)
            entry, slot = divmod(position, pages.page_size)
            if kv_lens[seq] and 0 <= entry < batch.pages_per_seq:
                page = int(batch.page_table[seq, entry])
                places[row] = (page, slot) if 0 < page < pages.num_pages else (0, None)
    return places


def assert_same_slots(write):
    pages, batch = noise_pages(16), make_batch(write)
    page_ids, slots = map(np.asarray, row_slots_jit(pages, batch, TOKENS))
    got = [(page, slot if page else None) for page, slot in zip(page_ids.tolist(), slots.tolist(), strict=True)]
    assert got == slots_by_loop(pages, batch, TOKENS)


@pytest.mark.parametrize("name", WRITES)
def test_rows_go_where_the_definition_says(name):
    assert_same_slots(WRITES[name])


@settings(max_examples=50, deadline=None, derandomize=True)
@given(write=ragged_writes())
def test_rows_of_any_batch_go_where_the_definition_says(write):
    assert_same_slots(write)


def test_page_zero_means_nowhere():
    pages, batch = noise_pages(16), make_batch(WRITES["null_page"])
    page_ids, _ = row_slots(pages, batch, TOKENS)
    assert page_ids.tolist()[:8] == [0] * 8  # positions 8..15, whose page is the null page
    assert page_ids.tolist()[16:] == [0] * 8  # padding
