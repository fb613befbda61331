"""The runs of a page write, as integers: each stored row is in one run, and no run leaves its span."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from page_write_data import SEQS, TOKENS, WRITES, make_batch, noise_pages, ragged_writes

from paged_kernels._src.page_write.slots import row_slots
from paged_kernels._src.page_write.tpu.runs import list_runs, max_runs

plan = jax.jit(list_runs, static_argnames=("span", "size"))


def runs_of(page_ids, slots, span, size):
    """The runs in use, as `(page, slot, row, length)`."""
    runs = plan(np.asarray(page_ids, np.int32), np.asarray(slots, np.int32), span=span, size=size)
    columns = [
        np.asarray(field)[: int(runs.count[0])].tolist() for field in (runs.page, runs.slot, runs.row, runs.length)
    ]
    return list(zip(*columns, strict=True))


def test_a_run_ends_at_its_span_its_page_and_at_a_row_that_goes_nowhere():
    page_ids = [7, 7, 7, 7, 3, 3, 0, 3, 5, 5]
    slots = [2, 3, 4, 5, 0, 1, 2, 3, 9, 1]
    assert runs_of(page_ids, slots, span=4, size=10) == [
        (7, 2, 0, 2),
        (7, 4, 2, 2),  # slot 4 starts a span
        (3, 0, 4, 2),  # another page
        (3, 3, 7, 1),  # after a row that is not stored
        (5, 9, 8, 1),
        (5, 1, 9, 1),  # not the next slot
    ]


def test_no_rows_make_no_runs():
    assert runs_of([0, 0, 0], [1, 2, 3], span=8, size=3) == []


def assert_plan_covers(write, page_size, span):
    page_ids, slots = map(np.asarray, row_slots(noise_pages(page_size), make_batch(write), TOKENS))
    size = max_runs(TOKENS, SEQS, span)
    runs = runs_of(page_ids, slots, span, size)
    assert len(runs) <= size
    places = []
    for page, slot, row, length in runs:
        assert slot // span == (slot + length - 1) // span
        places += [(row + j, page, slot + j) for j in range(length)]
    assert places == [(row, page, slots[row]) for row, page in enumerate(page_ids.tolist()) if page]
    assert len({(page, slot // span) for page, slot, _, _ in runs}) == len(runs)


@pytest.mark.parametrize(("page_size", "span"), [(16, 8), (16, 16), (64, 16)])
@pytest.mark.parametrize("name", WRITES)
def test_each_row_is_in_one_run_of_one_span(name, page_size, span):
    assert_plan_covers(WRITES[name], page_size, span)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(write=ragged_writes())
def test_each_row_of_any_batch_is_in_one_run(write):
    assert_plan_covers(write, 16, 8)


@pytest.mark.parametrize(
    ("q_lens", "first_slots", "span"), [((1,) * 5, (7,) * 5, 8), ((2, 10, 10), (7, 7, 7), 8), ((18,), (7,), 8)]
)
def test_the_bound_on_runs_is_reached(q_lens, first_slots, span):
    page_ids = np.repeat(np.arange(1, len(q_lens) + 1), q_lens)
    slots = np.concatenate([first + np.arange(n) for first, n in zip(first_slots, q_lens, strict=True)])
    tokens = len(slots)
    bound = max_runs(tokens, len(q_lens), span)
    assert bound - 1 <= len(runs_of(page_ids, slots, span, tokens)) <= bound
