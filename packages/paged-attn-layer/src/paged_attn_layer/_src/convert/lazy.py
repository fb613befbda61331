"""Arrays of which parts are read when they are needed: what weights are on their way from a file to a device."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.typing import DTypeLike

Shape = tuple[int, ...]
Index = tuple[slice, ...]
"""A part of an array: a slice of each axis, with a start, a stop, and no step."""

_BLOCK = 2 << 20
"""Bytes that are copied at once. With more, the copy of a transposed matrix is slower: it no longer fits the cache."""
_ALIGNMENT = 64
"""jax on the CPU takes an array that begins at a multiple of this without a copy."""


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array that is not in memory: its shape and type, and a function that copies a part of it."""

    shape: Shape
    dtype: np.dtype
    fill: Callable[[np.ndarray, Index], None]
    """Writes the part at an index, which is not empty, into an array of the part's shape, cast to the array's type."""

    @classmethod
    def of(cls, array: np.ndarray) -> "LazyArray":
        """An array that is in memory."""
        return cls.of_rows(array.shape, array.dtype, lambda start, stop: np.atleast_1d(array)[start:stop])

    @classmethod
    def of_rows(
        cls, shape: Shape, dtype: DTypeLike, rows: Callable[[int, int], np.ndarray], *, at_once: int = 1
    ) -> "LazyArray":
        """An array whose rows `start:stop` of the first axis a function gives. It is asked for a few at a time.

        Args:
            shape: of the array.
            dtype: of the array.
            rows: gives the rows.
            at_once: the least number of rows that it is asked for, but at the end.
        """
        dtype = np.dtype(dtype)
        step = max(at_once, _BLOCK // max(1, math.prod(shape[1:]) * dtype.itemsize))

        def fill(out: np.ndarray, index: Index) -> None:
            if not index:
                out[...] = rows(0, 1)[0]
            else:
                first, *rest = index
                for start in range(first.start, first.stop, step):
                    stop = min(start + step, first.stop)
                    out[start - first.start : stop - first.start] = rows(start, stop)[(slice(None), *rest)]

        return cls(shape, dtype, fill)

    @classmethod
    def unreadable(cls, shape: Shape) -> "LazyArray":
        """An array of which only the shape is known: enough to see what operations make of it."""

        def fill(_out: np.ndarray, _index: Index) -> None:
            raise RuntimeError("only the shape of this array is known")

        return cls(shape, np.dtype(np.float32), fill)

    def read(self, index: Index | None = None, dtype: DTypeLike | None = None) -> np.ndarray:
        """A part of the array, or all of it, in a type: by default the one that it has."""
        index = full_index(self.shape) if index is None else index
        out = empty([each.stop - each.start for each in index], dtype or self.dtype)
        if out.size:
            self.fill(out, index)
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The whole array, for numpy."""
        if copy is False:
            raise ValueError("copy=False must be True or None: a lazy array is not in memory")
        return self.read(dtype=dtype)


def as_lazy(array: Any) -> LazyArray:
    """The array as a lazy one: itself, if it is lazy already."""
    return array if isinstance(array, LazyArray) else LazyArray.of(np.asarray(array))


def full_index(shape: Shape) -> Index:
    """The index of the whole array.

    >>> full_index((2, 3))
    (slice(0, 2, None), slice(0, 3, None))
    """
    return tuple(slice(0, size) for size in shape)


def empty(shape: Any, dtype: DTypeLike) -> np.ndarray:
    """An array with any content. jax on the CPU takes it without a copy."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
