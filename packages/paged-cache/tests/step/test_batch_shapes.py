import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_cache import BatchShapes, ScheduledSequence, StepShape
from paged_cache._src.manager import LayerGroup, PageManager
from paged_kernels import RaggedBatch, check_batch

SHAPES = BatchShapes(tokens=(8, 16, 32), max_seqs=4, pages_per_seq=3)
NUM_PAGES, PAGE_SIZE = 12, 4


def build(*sequences, shapes=SHAPES):
    scheduled = [ScheduledSequence(*each) for each in sequences]
    return shapes.build(scheduled, num_pages=NUM_PAGES, page_size=PAGE_SIZE)


def positions(batch: RaggedBatch, tokens: int) -> list[int]:
    """The position of each of `tokens` rows in its sequence; -1 for gaps and padding."""
    rows = [-1] * tokens
    for seq in range(int(batch.num_seqs)):
        start, end = batch.cu_q_lens[seq : seq + 2].tolist()
        if batch.kv_lens[seq] > 0:
            first = int(batch.first_positions[seq])
            rows[start:end] = range(first, first + end - start)
    return rows


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
        ([([i + 1], 1, 1) for i in range(5)], "5 sequences are more than max_seqs=4"),
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
        (((8,), 4, 3, 0), "groups=0 must be at least 1"),
        (((8,), 4, 3, 2, (2,)), r"cross_groups=\(2,\) must lie in 0..1"),
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
        assert positions(step.batch, shape.tokens) == [-1] * shape.tokens
    with pytest.raises(ValueError, match="must be one of all_shapes"):
        SHAPES.warm_up_batch(StepShape(5, 5))


def test_a_shape_is_listed_once():
    assert BatchShapes(tokens=(1, 8), max_seqs=1, pages_per_seq=3).all_shapes() == [StepShape(1, 1), StepShape(8, 8)]


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
    assert positions(step.batch, tokens) == expected + [-1] * (tokens - len(expected))
    newest = [sum(s.q_len for s in sequences[: i + 1]) - 1 for i in range(len(sequences))]
    assert step.last_rows.tolist() == newest + [0] * (4 - len(newest))
    assert StepShape(tokens, step.batch.max_q_len) == step.layout.shape in SHAPES.all_shapes()


# pack: the same from arrays, with groups of layers


GROUPS = BatchShapes(tokens=(8, 16), max_seqs=4, pages_per_seq=3, groups=2)


def i32(*values):
    return np.array(values, np.int32)


def pack(tables, kv_lens, q_lens, *, shapes=SHAPES, **options):
    return shapes.pack(i32(*tables), i32(*kv_lens), i32(*q_lens), num_pages=NUM_PAGES, page_size=PAGE_SIZE, **options)


def test_pack_is_build_from_arrays():
    step = pack([[[1, 2, 0], [3, 4, 5]]], [6, 9], [6, 1], token_ids=np.arange(10, 17, dtype=np.int32))
    built = SHAPES.build(
        [ScheduledSequence([1, 2], 6, 6), ScheduledSequence([3, 4, 5], 9, 1)],
        num_pages=NUM_PAGES,
        page_size=PAGE_SIZE,
        token_ids=range(10, 17),
    )
    np.testing.assert_array_equal(step.buffer, built.buffer)
    assert step.layout == built.layout
    assert step.token_ids.tolist() == [*range(10, 17), 0]


def test_each_group_of_layers_has_its_tables_and_shares_the_rest():
    step = pack([[[1, 2, 3], [4, 0, 0]], [[0, 6, 7], [5, 0, 0]]], [9, 2], [1, 2], shapes=GROUPS)
    assert step.group(0).page_table.tolist() == [[1, 2, 3], [4, 0, 0], [0] * 3, [0] * 3]
    assert step.group(1).page_table.tolist() == [[0, 6, 7], [5, 0, 0], [0] * 3, [0] * 3]  # a window dropped page 0
    assert step.group(1).cu_q_lens is not step.group(0).cu_q_lens
    assert step.group(1).cu_q_lens.tolist() == step.batch.cu_q_lens.tolist() == [0, 1, 3, 3, 3]
    with pytest.raises(ValueError, match=r"index=2 must lie in 0\.\.1, the layer groups"):
        step.group(2)


def test_cross_attention_sees_keys_that_are_not_the_sequence_s():
    shapes = BatchShapes(tokens=(8, 16), max_seqs=4, pages_per_seq=3, groups=2, cross_groups=(1,))
    tables = [[[1, 2, 0], [3, 0, 0]], [[9, 0, 0], [9, 0, 0]]]  # a page that both read
    step = pack(tables, [6, 1], [6, 1], shapes=shapes, cross_tokens=i32(3, 0))
    cross = step.group(1)
    assert (cross.kv_lens.tolist(), cross.q_starts.tolist()) == ([3, 0, 0, 0], [0, 0, 0, 0])
    assert positions(cross, 8) == [0, 1, 2, 3, 4, 5, -1, -1]  # the second sequence has nothing to see
    assert step.batch.q_starts is None
    for wrong, message in [
        ({}, r"cross_tokens must be given, int32 \[n\], as cross_groups=\(1,\)"),
        ({"cross_tokens": i32(3)}, r"cross_tokens is int32\[1\]; it must be a numpy array, int32\[2\]"),
        ({"cross_tokens": i32(3, 13)}, r"cross_tokens\[1\]=13 must lie in 0\.\.12, what 3 pages hold"),
    ]:
        with pytest.raises(ValueError, match=message):
            pack(tables, [6, 1], [6, 1], shapes=shapes, **wrong)
    with pytest.raises(ValueError, match=r"sequence 1 has page_ids\[0\]=0 of group 0; it must lie in 1\.\.11"):
        pack([[[1, 2, 0], [0, 3, 0]], tables[1]], [6, 1], [6, 1], shapes=shapes, cross_tokens=i32(3, 0))
    with pytest.raises(ValueError, match=r"cross_tokens must be None, as cross_groups=\(\)"):
        pack([[[1, 2, 0]]], [6], [6], cross_tokens=i32(3))


def test_the_page_tables_of_a_page_manager_can_be_packed():
    """A long prompt in chunks, a forked answer and a window that drops pages, all beside cross-attention."""
    groups = [LayerGroup.full(), LayerGroup.window(5), LayerGroup.chunked(8), LayerGroup.cross()]
    manager = PageManager(64, PAGE_SIZE, max_seqs=4, max_sequence_length=24, groups=groups)
    shapes = BatchShapes(tokens=(8, 16), max_seqs=4, pages_per_seq=6, groups=4, cross_groups=(3,))

    def compute(seqs, counts):
        step = shapes.pack(
            manager.page_tables(seqs),
            manager.lengths(seqs),
            i32(*counts),
            num_pages=manager.num_pages,
            page_size=PAGE_SIZE,
            cross_tokens=manager.cross_tokens(seqs),
        )
        manager.commit(seqs, counts)
        return step

    seqs = [manager.admit(list(range(10)), chunk=7, cross_tokens=6)]
    assert compute(seqs, [7]).positions.tolist() == [*range(7), 0]
    manager.extend(seqs, 3)
    assert compute(seqs, [3]).positions.tolist() == [7, 8, 9, 0, 0, 0, 0, 0]
    seqs += manager.fork(seqs[0])
    for length in range(11, 25):
        manager.extend(seqs, 1)
        step = compute(seqs, [1, 1])
        assert step.positions.tolist() == [length - 1, length - 1, 0, 0]
    assert step.group(0).page_table[:2].all()
    assert step.group(1).page_table[:2].astype(bool).tolist() == [[False] * 4 + [True] * 2] * 2
    assert step.group(3).kv_lens.tolist() == [6, 6, 0, 0]


def test_nothing_of_an_earlier_step_is_left():
    fill = pack([[[1, 2, 3], [4, 5, 6]]], [9, 9], [1, 1])
    fill.buffer[:] = -1
    del fill
    again = [pack([[[1, 0, 0]]], [1], [1]).buffer for _ in range(2)]
    assert again[0].tobytes() == again[1].tobytes()
    assert again[0].min() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1, 2, 0]], [6], [6]), "page_tables is int32[1, 3]; it must be a numpy array, int32[1, 1, 3]"),
        (([[[1, 2]]], [6], [6]), "page_tables is int32[1, 1, 2]; it must be a numpy array, int32[1, 1, 3]"),
        (([[[1, 2, 0]]], [6], [6, 1]), "q_lens is int32[2]; it must be a numpy array, int32[1]"),
        (([[[1, 2, 0]]], [[6]], [6]), "kv_lens is int32[1, 1]; it must be a numpy array, int32[1]"),
        (([[[1, 2, 12]]], [6], [1]), "sequence 0 has page_ids[2]=12; it must lie in 1..11"),
        (([[[1, 0, 0]]], [6], [1]), "sequence 0 has page_ids[1]=0; it must lie in 1..11"),
        (([[[1, 2, 3], [4, 5, 6]]], [9, 13], [1, 1]), "sequence 1 with kv_len=13 needs 4 pages of 4, more than"),
        (([[[1, 2, 3]]], [2**31 - 1], [1]), "sequence 0 with kv_len=2147483647 needs 536870912 pages of 4, more than"),
        (([[[1, 2, 3], [4, 2, 0]]], [5, 6], [1, 2]), "page 2 would be written 2 times in one step"),
    ],
)
def test_what_does_not_fit_is_not_packed(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        pack(*arguments)


def test_more_tokens_than_an_int32_counts_are_refused():
    shapes = BatchShapes(tokens=(8,), max_seqs=4, pages_per_seq=2)
    tables, lens = np.arange(1, 9, dtype=np.int32).reshape(1, 4, 2), np.full(4, 2**30, np.int32)
    with pytest.raises(ValueError, match="4294967296 tokens are more than the largest of"):
        shapes.pack(tables, lens, lens, num_pages=9, page_size=2**29)


def test_other_types_are_refused():
    tables, one = np.ones((1, 1, 3), np.int32), i32(1)
    sizes = {"num_pages": NUM_PAGES, "page_size": PAGE_SIZE}
    with pytest.raises(ValueError, match=r"page_tables is int64\[1, 1, 3\]; it must be a numpy array, int32"):
        SHAPES.pack(tables.astype(np.int64), one, one, **sizes)
    with pytest.raises(ValueError, match=r"q_lens is a list; it must be a numpy array, int32\[1\]"):
        SHAPES.pack(tables, one, [1], **sizes)
    with pytest.raises(ValueError, match=r"token_ids is int32\[2\]; it must be a numpy array, int32\[1\]"):
        SHAPES.pack(tables, one, one, i32(1, 2), **sizes)


def test_a_page_belongs_to_one_group():
    with pytest.raises(ValueError, match="page 2 would be written 2 times in one step"):
        pack([[[1, 2, 0]], [[3, 2, 0]]], [6], [1], shapes=GROUPS)
    with pytest.raises(ValueError, match=r"sequence 0 has page_ids\[0\]=-1 of group 1; it must lie in 1\.\.11"):
        pack([[[1, 2, 0]], [[-1, 2, 0]]], [6], [1], shapes=GROUPS)
    with pytest.raises(ValueError, match="groups=2, but a ScheduledSequence has pages of one group; use pack"):
        build(([1], 1, 1), shapes=GROUPS)


def test_replicas_take_the_shape_that_fits_each():
    q_lens = [i32(1, 1), i32(7, 2), i32()]
    shape = SHAPES.shape_for(*q_lens)
    assert shape == StepShape(16, 16)
    decode = pack([[[1, 0, 0], [2, 0, 0]]], [1, 2], q_lens[0], shape=shape)
    assert (decode.positions.tolist(), decode.batch.max_q_len) == ([0, 1] + [0] * 14, 16)
    with pytest.raises(ValueError, match=r"too small for 9 rows of 2 sequences; take shape_for\(\.\.\.\)"):
        pack([[[1, 2, 0], [3, 0, 0]]], [7, 2], q_lens[1], shape=StepShape(8, 8))
    with pytest.raises(ValueError, match=r"max_q_len=1\) is too small for 2 rows of 1 sequences"):
        pack([[[1, 2, 0]]], [7], [2], shape=StepShape(4, 1))
    with pytest.raises(ValueError, match=r"shape=StepShape\(tokens=9, max_q_len=9\) must be one of all_shapes"):
        pack([[[1, 2, 0]]], [7], [2], shape=StepShape(9, 9))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=6))
def test_no_shape_but_those_listed_comes_out(q_lens):
    """Whatever is asked of four slots and 32 rows: a listed shape that holds it, or a refusal."""
    fits = len(q_lens) <= 4 and (sum(q_lens) <= 32 or max(q_lens) == 1)
    try:
        shape = SHAPES.shape_for(i32(*q_lens))
    except ValueError:
        assert not fits
    else:
        assert fits
        assert shape in SHAPES.all_shapes()
        assert shape.tokens >= sum(q_lens)
        assert shape.max_q_len >= max(q_lens, default=1)


# pack_seqs: from a page manager


def managed(*groups):
    """A manager with two sequences, of 5 tokens and of 2, the first of which has computed 4."""
    groups = groups or (LayerGroup.full(),)
    manager = PageManager(33, PAGE_SIZE, max_seqs=5, max_sequence_length=12, groups=groups)
    cross_tokens = 3 * (not all(group.is_self_attention for group in groups))
    seqs = [manager.admit(prompt, cross_tokens=cross_tokens) for prompt in ([3, 1, 4, 1, 5], [9, 2])]
    manager.commit(seqs[0], 4)
    return manager, seqs


@pytest.mark.parametrize(
    "groups",
    [
        (LayerGroup.full(),),
        (LayerGroup.window(2), LayerGroup.full()),
        (LayerGroup.full(), LayerGroup.cross(), LayerGroup.chunked(4)),
    ],
    ids=lambda groups: " ".join(group.kind for group in groups),
)
def test_a_step_of_a_manager_is_that_of_its_arrays(groups):
    manager, seqs = managed(*groups)
    cross = manager.cross_groups
    shapes = BatchShapes(tokens=(8, 16), max_seqs=4, pages_per_seq=3, groups=len(groups), cross_groups=cross)
    sizes = {"num_pages": 33, "page_size": PAGE_SIZE, "cross_tokens": manager.cross_tokens(seqs) if cross else None}
    for q_lens, kv_lens, ids in (([1, 2], [5, 2], [5, 9, 2]), ([1, 1], [5, 1], [5, 9])):
        step = shapes.pack_seqs(manager, seqs, i32(*ids), q_lens=i32(*q_lens))
        want = shapes.pack(manager.page_tables(seqs), i32(*kv_lens), i32(*q_lens), i32(*ids), **sizes)
        assert (step.layout, step.buffer.tolist()) == (want.layout, want.buffer.tolist())
    step = shapes.pack_seqs(manager, seqs)
    want = shapes.pack(manager.page_tables(seqs), i32(5, 2), i32(1, 2), **sizes)
    assert step.buffer.tolist() == want.buffer.tolist(), "all that is left, without token ids"
    assert shapes.pack_seqs(manager, seqs, shape=StepShape(16, 16)).layout.shape.tokens == 16
    assert shapes.pack_seqs(manager, []).buffer.tolist() == shapes.warm_up_batch(StepShape(4, 1)).buffer.tolist()


def test_a_step_of_a_manager_has_tables_of_its_own():
    manager, seqs = managed()
    step = BatchShapes(tokens=(8,), max_seqs=2, pages_per_seq=3).pack_seqs(manager, seqs)
    step.array("page_tables")[...] = 7
    assert manager.page_tables(seqs).max() < 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q_lens": i32(1, 3)}, r"sequence 1 computes q_lens=3 tokens; it must be 1\.\.2, those that have a slot"),
        ({"q_lens": i32(0, 1)}, r"sequence 0 computes q_lens=0 tokens; it must be 1\.\.1"),
        ({"q_lens": [1, 1]}, r"q_lens is a list; it must be a numpy array, int32\[2\]"),
        ({"q_lens": i32(1)}, r"q_lens is int32\[1\]; it must be a numpy array, int32\[2\]"),
        ({"token_ids": i32(1, 2)}, r"token_ids is int32\[2\]; it must be a numpy array, int32\[3\]"),
        ({"shape": StepShape(4, 1)}, "is too small for 3 rows of 2 sequences"),
    ],
)
def test_more_tokens_than_are_left_are_refused(options, message):
    manager, seqs = managed()
    with pytest.raises(ValueError, match=message):
        SHAPES.pack_seqs(manager, seqs, **options)


def test_sequences_with_nothing_left_or_that_do_not_exist_are_refused():
    manager, seqs = managed()
    manager.commit(seqs[0])
    with pytest.raises(ValueError, match=r"sequence 0 computes q_lens=0 tokens; .*; extend it first"):
        SHAPES.pack_seqs(manager, seqs)
    with pytest.raises(ValueError, match="sequence 99 does not exist"):
        SHAPES.pack_seqs(manager, [99])


@pytest.mark.parametrize(
    "shapes",
    [
        BatchShapes(tokens=(8,), max_seqs=4, pages_per_seq=4),
        BatchShapes(tokens=(8,), max_seqs=4, pages_per_seq=3, groups=2),
        BatchShapes(tokens=(8,), max_seqs=4, pages_per_seq=3, cross_groups=(0,)),
    ],
)
def test_shapes_that_are_not_the_managers_are_refused(shapes):
    manager, seqs = managed()
    with pytest.raises(ValueError, match="manager has groups, pages_per_seq and cross_groups"):
        shapes.pack_seqs(manager, seqs)
