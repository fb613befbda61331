import numpy as np
import pytest

from paged_attn_layer._src.convert.lazy import LazyArray, as_lazy, empty


def test_rows_are_asked_for_a_few_at_a_time():
    """Two megabytes at once, however large the array is."""
    matrix, asked = np.arange(3 << 19, dtype=np.float32).reshape(-1, 1024), []
    lazy = LazyArray.of_rows(matrix.shape, np.float32, lambda *ends: asked.append(ends) or matrix[slice(*ends)])
    np.testing.assert_array_equal(lazy.read(), matrix)
    assert asked == [(0, 512), (512, 1024), (1024, 1536)]
    asked.clear()
    part = lazy.read((slice(500, 600), slice(3, 5)), np.float64)
    assert (asked, part.dtype) == ([(500, 600)], np.float64)
    np.testing.assert_array_equal(part, matrix[500:600, 3:5])


def test_arrays_without_axes_and_without_elements():
    assert LazyArray.of(np.float32(3)).read() == 3
    assert LazyArray.of(np.ones((2, 0))).read().shape == (2, 0)
    assert LazyArray.of(np.ones(4)).read((slice(2, 2),)).shape == (0,)


def test_it_is_an_array_for_numpy():
    lazy = as_lazy(np.arange(3))
    assert as_lazy(lazy) is lazy
    np.testing.assert_array_equal(lazy, [0, 1, 2])
    with pytest.raises(ValueError, match=r"copy=False must be True or None"):
        np.array(lazy, copy=False)


def test_an_array_of_which_only_the_shape_is_known():
    with pytest.raises(RuntimeError, match="only the shape"):
        LazyArray.unreadable((2,)).read()


def test_memory_that_jax_takes_without_a_copy():
    for _ in range(5):
        assert empty((3, 5), np.float16).ctypes.data % 64 == 0
