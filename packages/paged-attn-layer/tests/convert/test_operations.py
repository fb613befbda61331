import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paged_attn_layer._src.convert.operations import (
    Add,
    Concat,
    Deinterleave,
    Interleave,
    Permute,
    Reshape,
    Split,
    Stack,
    Transpose,
    Unstack,
    apply_all,
    reverse_all,
    shapes_after_all,
)
from paged_attn_layer._src.convert.rotary_rows import RotaryHalvesToPairs, RotaryPairsToHalves

sizes = st.integers(1, 4)


def numbered(shapes):
    """Arrays of these shapes in which all numbers differ."""
    ends = np.cumsum([0, *(int(np.prod(shape)) for shape in shapes)])
    return [np.arange(start, start + np.prod(s)).reshape(s) for start, s in zip(ends, shapes, strict=False)]


@st.composite
def operation_and_shapes(draw):
    """Any operation, with shapes of arrays that it takes."""
    shape = tuple(draw(st.lists(sizes, min_size=2, max_size=4)))
    axis, count = draw(st.integers(0, len(shape) - 1)), draw(sizes)
    parts = tuple(draw(st.lists(sizes, min_size=1, max_size=3)))
    heads = draw(sizes)
    several = [shape] * draw(sizes)
    operation, shapes = draw(
        st.sampled_from(
            [
                (Transpose(), several),
                (Permute(tuple(draw(st.permutations(range(len(shape)))))), several),
                (Reshape(shape, (int(np.prod(shape)),)), several),
                (Split(axis, parts), [(*s[:axis], sum(parts), *s[axis + 1 :]) for s in several]),
                (Concat(axis, parts), [(*s[:axis], n, *s[axis + 1 :]) for s in several for n in parts]),
                (Stack(count, axis), several * count),
                (Unstack(count, axis), [(*s[:axis], count, *s[axis:]) for s in several]),
                (Deinterleave(count), [(*s[:-1], count * s[-1]) for s in several]),
                (Interleave(count), several * count),
                (Add(float(count)), several),
                (RotaryPairsToHalves(heads), [(heads * 2 * s[0], *s[1:]) for s in several]),
                (RotaryHalvesToPairs(heads), [(heads * 2 * s[0], *s[1:]) for s in several]),
            ]
        )
    )
    return operation, shapes


@given(operation_and_shapes())
def test_the_reverse_undoes_it_and_the_shapes_are_known_before(case):
    operation, shapes = case
    arrays = numbered(shapes)
    results = apply_all([operation], arrays)
    assert shapes_after_all([operation], shapes) == [result.shape for result in results]
    back = operation.reverse().apply(results)
    assert len(back) == len(arrays)
    for array, again in zip(arrays, back, strict=True):
        np.testing.assert_array_equal(again, array)
    assert operation.reverse().reverse() == operation


@given(operation_and_shapes(), st.data())
def test_any_part_of_a_result_is_that_part_of_the_whole(case, data):
    operation, shapes = case
    for result in apply_all([operation], numbered(shapes)):
        ends = [sorted(data.draw(st.tuples(*[st.integers(0, size)] * 2))) for size in result.shape]
        part = tuple(slice(*pair) for pair in ends)
        np.testing.assert_array_equal(result.read(part), result.read()[part])
        assert result.read(part, np.float32).dtype == np.float32


def apply(operation, *arrays):
    return [result.read() for result in apply_all([operation], arrays)]


def test_what_each_does():
    a, b = numbered([(2, 3), (2, 3)])
    np.testing.assert_array_equal(apply(Transpose(), a)[0], a.T)
    np.testing.assert_array_equal(apply(Permute((1, 0)), a)[0], a.T)
    np.testing.assert_array_equal(apply(Reshape((2, 3), (6,)), a)[0], a.ravel())
    for part, want in zip(apply(Split(1, (1, 2)), a), (a[:, :1], a[:, 1:]), strict=True):
        np.testing.assert_array_equal(part, want)
    np.testing.assert_array_equal(apply(Concat(0, (2, 2)), a, b)[0], np.concatenate([a, b]))
    np.testing.assert_array_equal(apply(Stack(2), a, b)[0], np.stack([a, b]))
    np.testing.assert_array_equal(apply(Unstack(2), a)[1], a[1])
    np.testing.assert_array_equal(apply(Add(-1.0), a)[0], a - 1)
    for part, want in zip(apply(Deinterleave(3), a), (a[:, :1], a[:, 1:2], a[:, 2:]), strict=True):
        np.testing.assert_array_equal(part, want)
    np.testing.assert_array_equal(apply(Interleave(2), a, b)[0][0], [0, 6, 1, 7, 2, 8])


def test_a_sum_is_cast_after_it_is_made():
    """0.99609375 + 1 is 2 in bfloat16."""
    (result,) = apply_all([Add(-1.0)], [np.array([1.99609375], np.float32)])
    assert result.read(dtype="bfloat16") == 0.99609375


def test_types_that_a_file_mixes_become_one_that_holds_both():
    halves = [np.ones(2, dtype) for dtype in (np.float16, jnp.bfloat16)]
    (together,) = apply_all([Concat(0, (2, 2))], halves)
    assert together.dtype == np.float32


def test_several_in_turn():
    """The gates and ups of three experts become one array [expert, in, gate and up]."""
    operations = (Stack(3), Concat(1, (4, 5)), Transpose())
    shapes = [(4, 2)] * 3 + [(5, 2)] * 3
    arrays = numbered(shapes)
    (fused,) = apply_all(operations, arrays)
    assert [fused.shape] == shapes_after_all(operations, shapes) == [(3, 2, 9)]
    np.testing.assert_array_equal(fused.read()[1], np.concatenate([arrays[1], arrays[4]]).T)
    for array, again in zip(arrays, apply_all(reverse_all(operations), [fused]), strict=True):
        np.testing.assert_array_equal(again, array)


@pytest.mark.parametrize(
    ("operation", "shapes", "message"),
    [
        (Transpose(), [(3,)], r"shape \(3,\) must have at least 2 axes"),
        (Permute((1, 0)), [(2, 3, 4)], r"shape \(2, 3, 4\) must have 2 axes"),
        (Reshape((2, 3), (6,)), [(3, 2)], r"shape \(3, 2\) must be \(2, 3\)"),
        (Split(0, (1, 2)), [(4, 2)], r"axis 0 of \(4, 2\) must have size 3"),
        (Split(2, (1, 2)), [(4, 2)], r"shape \(4, 2\) has no axis 2"),
        (Concat(0, (1, 2)), [(1, 2)], r"1 arrays must be a multiple of 2"),
        (Concat(0, (1, 2)), [(1, 2), (2, 3)], r"shape \(2, 3\) must be \(2, 2\)"),
        (Stack(2), [(2,), (3,)], r"shapes \[\(2,\), \(3,\)\] must be equal"),
        (Stack(2), [], r"0 arrays must be a multiple of 2"),
        (Stack(2, axis=2), [(2,), (2,)], r"axis=2 must be in 0..1"),
        (Unstack(2), [(3, 2)], r"axis 0 of \(3, 2\) must have size 2"),
        (Deinterleave(2), [(2, 3)], r"the last axis of \(2, 3\) must be a multiple of 2"),
        (Interleave(2), [(2,), (3,)], r"shapes \[\(2,\), \(3,\)\] must be equal"),
        (Interleave(2), [(), ()], r"must be equal, with an axis"),
        (RotaryPairsToHalves(2), [(6, 2)], r"axis 0 of \(6, 2\) must be a multiple of 4: 2 heads of an even size"),
        (RotaryHalvesToPairs(2), [()], r"axis 0 of \(\) must be a multiple of 4"),
    ],
)
def test_shapes_that_do_not_fit(operation, shapes, message):
    with pytest.raises(ValueError, match=message):
        shapes_after_all([operation], shapes)


def test_operations_that_mean_nothing():
    with pytest.raises(ValueError, match=r"axes=\(0, 2\) must name each axis from 0 on once"):
        Permute((0, 2))
    with pytest.raises(ValueError, match=r"before=\(2, 3\) and after=\(5,\) must have the same number of elements"):
        Reshape((2, 3), (5,))
