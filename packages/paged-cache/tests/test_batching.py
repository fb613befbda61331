import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_cache import BatchShapes, ScheduledSequence, StepShape, stack_batches
from paged_kernels import check_batch, pack_tree_masks, token_rows

SHAPES = BatchShapes(tokens=(8, 16, 32), seqs=4, pages_per_seq=3)
NUM_PAGES, PAGE_SIZE = 12, 4


def build(*sequences, shapes=SHAPES):
    scheduled = [ScheduledSequence(*each) for each in sequences]
    return shapes.build(scheduled, num_pages=NUM_PAGES, page_size=PAGE_SIZE)


def test_mixed_step():
    step = build(([1, 2], 6, 6), ([3, 4, 5], 9, 1), ([6, 7, 8], 5, 2))
    batch = step.batch
    assert batch.page_table.tolist() == [[1, 2, 0], [3, 4, 5], [6, 7, 0], [0, 0, 0]]  # page 8 is not in use yet
    assert batch.kv_lens.tolist() == [6, 9, 5, 0]
    assert batch.cu_q_lens.tolist() == [0, 6, 7, 9, 9]
    assert (int(batch.num_seqs), batch.max_q_len) == (3, 16)
    assert step.positions.tolist() == [0, 1, 2, 3, 4, 5, 8, 3, 4] + [0] * 7
    assert step.last_rows.tolist() == [5, 6, 8, 0]


def test_decode_only_step_has_a_row_a_sequence_slot():
    step = build(([1, 2], 6, 1), ([3], 1, 1))
    assert step.positions.tolist() == [5, 0, 0, 0]
    assert step.last_rows.tolist() == [0, 1, 0, 0]
    assert (step.batch.max_q_len, int(step.batch.num_seqs)) == (1, 2)


def test_no_sequence_is_all_padding():
    step = build()
    assert (step.positions.shape, int(step.batch.num_seqs)) == ((4,), 0)


@pytest.mark.parametrize(("q_len", "tokens"), [(2, 8), (7, 8), (8, 16), (11, 16)])
def test_the_smallest_bucket_that_fits(q_len, tokens):
    assert build(([1, 2, 3], q_len, q_len), ([4], 1, 1)).positions.shape == (tokens,)


@pytest.mark.parametrize("kind", [list, tuple, np.asarray])
def test_page_ids_may_be_any_sequence(kind):
    assert build((kind([3, 1]), 5, 1)).batch.page_table[0].tolist() == [3, 1, 0]


def test_a_shared_prefix_may_be_read_by_many():
    step = build(([1, 2], 5, 1), ([1, 3], 6, 2))
    assert step.batch.page_table[:2, 0].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([([i + 1], 1, 1) for i in range(5)], "5 sequences are more than seqs=4"),
        ([([1, 2, 3], 12, 12), ([4, 5, 6], 12, 12), ([7, 8, 9], 12, 12)], r"36 tokens are more than the largest of"),
        ([([1, 2, 3, 4], 13, 1)], "sequence 0 with kv_len=13 needs 4 pages of 4, more than pages_per_seq=3"),
        ([([5], 1, 1), ([1], 5, 1)], "sequence 1 with kv_len=5 needs 2 pages of 4, but has 1"),
        ([([1], 2, 0)], "sequence 0 has q_len=0; it must be at least 1"),
        ([([1], 2, -3)], "sequence 0 has q_len=-3"),
        ([([1], 2, 3)], "sequence 0 has kv_len=2; it must count this step's q_len=3 tokens too"),
        ([([1, 0], 5, 1)], r"sequence 0 has page_ids\[1\]=0; it must lie in 1\.\.11"),
        ([([1], 1, 1), ([12], 1, 1)], r"sequence 1 has page_ids\[0\]=12"),
        ([([-1], 1, 1)], r"sequence 0 has page_ids\[0\]=-1"),
        ([([7], 2, 1), ([7], 3, 1)], "page 7 would be written 2 times in one step"),
        ([([7, 7], 6, 6)], "page 7 would be written 2 times in one step"),
    ],
)
def test_what_does_not_fit_is_refused(sequences, message):
    with pytest.raises(ValueError, match=message):
        build(*sequences)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (((), 4, 3), r"tokens=\(\) must be ascending"),
        (((8, 8), 4, 3), r"tokens=\(8, 8\) must be ascending"),
        (((0, 8), 4, 3), r"tokens=\(0, 8\) must be ascending row counts of at least 1"),
        (((8,), 0, 3), "seqs=0 must be at least 1"),
        (((8,), 4, 0), "pages_per_seq=0 must be at least 1"),
    ],
)
def test_malformed_shapes_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        BatchShapes(*fields)


def test_warm_up_batches_have_every_shape_and_no_sequence():
    for shape in SHAPES.all_shapes():
        step = SHAPES.warm_up_batch(shape)
        assert (step.positions.shape[0], step.batch.max_q_len) == shape
        assert int(step.batch.num_seqs) == 0
        assert (np.asarray(token_rows(step.batch, shape.tokens).position) == -1).all()
    with pytest.raises(ValueError, match="must be one of all_shapes"):
        SHAPES.warm_up_batch(StepShape(5, 5))


def test_after_warm_up_nothing_compiles():
    run = jax.jit(lambda step: step.positions.sum())
    for shape in SHAPES.all_shapes():
        run(SHAPES.warm_up_batch(shape))
    warm = run._cache_size()
    for step in (build(([1], 1, 1)), build(([1, 2], 8, 8)), build(([1, 2, 3], 9, 9), ([4], 1, 1)), build()):
        run(step)
    assert run._cache_size() == warm == 4


@st.composite
def schedules(draw):
    """Sequences that fit, on pages of their own."""
    free = draw(st.permutations(range(1, NUM_PAGES)))
    sequences = []
    for _ in range(draw(st.integers(0, 4))):
        kv_len = draw(st.integers(1, 11))
        used = -(-kv_len // PAGE_SIZE)
        if used > len(free):
            break
        pages, free = free[:used], free[used:]
        sequences.append(ScheduledSequence(pages, kv_len, draw(st.integers(1, min(kv_len, 8)))))
    return sequences


@settings(max_examples=80, deadline=None)
@given(schedules())
def test_agrees_with_a_loop_over_tokens_and_with_layer_1(sequences):
    step = SHAPES.build(sequences, num_pages=NUM_PAGES, page_size=PAGE_SIZE)
    tokens = step.positions.shape[0]
    check_batch(step.batch, num_pages=NUM_PAGES, page_size=PAGE_SIZE, tokens=tokens)
    expected = [s.kv_len - s.q_len + j for s in sequences for j in range(s.q_len)]
    assert step.positions.tolist() == expected + [0] * (tokens - len(expected))
    rows = token_rows(step.batch, tokens)
    assert np.asarray(rows.position).tolist() == expected + [-1] * (tokens - len(expected))
    newest = [sum(s.q_len for s in sequences[: i + 1]) - 1 for i in range(len(sequences))]
    assert step.last_rows.tolist() == newest + [0] * (4 - len(newest))
    assert StepShape(tokens, step.batch.max_q_len) in SHAPES.all_shapes()


def test_stacked_batches_have_a_leading_axis():
    first, second = build(([1], 3, 2)).batch, build(([2, 3], 5, 4)).batch
    stacked = stack_batches([first, second])
    assert stacked.kv_lens.tolist() == [[3, 0, 0, 0], [5, 0, 0, 0]]
    assert stacked.num_seqs.tolist() == [1, 1]
    assert stacked.max_q_len == 8


def test_only_batches_of_one_shape_stack():
    with pytest.raises(ValueError, match="batches is empty"):
        stack_batches([])
    chunk, decode = build(([1], 3, 2)).batch, build(([1], 3, 1)).batch
    with pytest.raises(ValueError, match="must agree in max_q_len, in which arrays they have and in their shapes"):
        stack_batches([chunk, decode])
    in_a_tree = dataclasses.replace(chunk, tree_mask=pack_tree_masks([None], [2], tokens=8))
    with pytest.raises(ValueError, match=r"must agree .* \('\.tree_mask', \(8, 1\)\)"):
        stack_batches([chunk, in_a_tree])
    assert stack_batches([in_a_tree, in_a_tree]).tree_mask.shape == (2, 8, 1)
