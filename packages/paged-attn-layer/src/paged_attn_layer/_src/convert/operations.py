"""Reversible changes of weights between a checkpoint's form and ours.

An operation takes a list of arrays and returns a list of arrays. Its `reverse()` is the operation that undoes it, bit
for bit. Nothing is read when an operation is applied: the arrays are lazy (`lazy.py`). A part of a result is later made
of the parts that it needs, which are written to their place directly. So experts that are stacked are in memory once.
"""

import abc
import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from paged_attn_layer._src.convert.lazy import Index, LazyArray, Shape, as_lazy

_T = TypeVar("_T")


class Operation(abc.ABC):
    """A reversible change of a list of arrays."""

    @abc.abstractmethod
    def apply(self, arrays: Sequence[LazyArray]) -> list[LazyArray]:
        """The changed arrays. Nothing is read.

        Raises:
            ValueError: the operation does not fit the arrays' shapes.
        """

    @abc.abstractmethod
    def reverse(self) -> "Operation":
        """The operation that undoes this one."""


def apply_all(operations: Sequence[Operation], arrays: Sequence[Any]) -> list[LazyArray]:
    """The arrays after all operations, in turn. They may be lazy or in memory.

    Raises:
        ValueError: an operation does not fit the arrays' shapes.
    """
    lazy = [as_lazy(array) for array in arrays]
    return functools.reduce(lambda values, operation: operation.apply(values), operations, lazy)


def shapes_after_all(operations: Sequence[Operation], shapes: Sequence[Shape]) -> list[Shape]:
    """The shapes of what `apply_all` returns for arrays of these shapes.

    Raises:
        ValueError: an operation does not fit these shapes.
    """
    return [array.shape for array in apply_all(operations, [LazyArray.unreadable(shape) for shape in shapes])]


def reverse_all(operations: Sequence[Operation]) -> tuple[Operation, ...]:
    """The operations that undo these ones: the reverse of each, last one first."""
    return tuple(operation.reverse() for operation in reversed(operations))


@dataclasses.dataclass(frozen=True)
class Transpose(Operation):
    """Swaps the last two axes: a matrix `[out, in]` becomes `[in, out]`."""

    def apply(self, arrays: Sequence[LazyArray]) -> list[LazyArray]:
        """Each array with its last two axes swapped."""
        for array in arrays:
            _require(len(array.shape) >= 2, f"shape {array.shape} must have at least 2 axes to be transposed")
        ranks = [len(array.shape) for array in arrays]
        return [
            _permuted(array, (*range(rank - 2), rank - 1, rank - 2)) for array, rank in zip(arrays, ranks, strict=True)
        ]

    def reverse(self) -> "Transpose":
        """The same operation."""
        return self


@dataclasses.dataclass(frozen=True)
class Permute(Operation):
    """Puts the axes of each array in another order: axis `i` of the result is axis `axes[i]`."""

    axes: tuple[int, ...]

    def __post_init__(self) -> None:
        _require(
            sorted(self.axes) == list(range(len(self.axes))), f"axes={self.axes} must name each axis from 0 on once"
        )

    def apply(self, arrays: Sequence[LazyArray]) -> list[LazyArray]:
        """Each array with its axes in the new order."""
        for array in arrays:
            fits = len(array.shape) == len(self.axes)
            _require(fits, f"shape {array.shape} must have {len(self.axes)} axes for {self}")
        return [_permuted(array, self.axes) for array in arrays]

    def reverse(self) -> "Permute":
        """The permutation that puts every axis back."""
        return Permute(_inverse(self.axes))


@dataclasses.dataclass(frozen=True)
class Reshape(Operation):
    """Gives each array of shape `before` the shape `after`."""

    before: Shape
    after: Shape

    def __post_init__(self) -> None:
        _require(
            math.prod(self.before) == math.prod(self.after),
            f"before={self.before} and after={self.after} must have the same number of elements",
        )

    def apply(self, arrays: Sequence[LazyArray]) -> list[LazyArray]:
        """Each array in its new shape. For any part of it, the whole array is read."""
        for array in arrays:
            _require(array.shape == self.before, f"shape {array.shape} must be {self.before} for {self}")
        return [self._reshaped(array) for array in arrays]

    def reverse(self) -> "Reshape":
        """The change back."""
        return Reshape(self.after, self.before)

    def _reshaped(self, array: LazyArray) -> LazyArray:
        def fill(out: np.ndarray, index: Index) -> None:
            out[...] = array.read(dtype=out.dtype).reshape(self.after)[index]

        return LazyArray(self.after, array.dtype, fill)


@dataclasses.dataclass(frozen=True)
class Split(Operation):
    """Cuts each array into parts along an axis: a fused Q, K, V becomes three arrays."""

    axis: int
    sizes: tuple[int, ...]
    """The size of each part along the axis."""

    def apply(self, arrays: Sequence[LazyArray]) -> list[LazyArray]:
        """The parts of the first array, then those of the second, and so on."""
        for array in arrays:
            _require_size(array.shape, self.axis, sum(self.sizes), self)
        return [
            _part(array, self.axis, stop - size, size)
            for array in arrays
            for size, stop in zip(self.sizes, itertools.accumulate(self.sizes), strict=True)
        ]

    def reverse(self) -> "Concat":
        """Joins the parts."""
        return Concat(self.axis, self.sizes)


@dataclasses.dataclass(frozen=True)
class Concat(Operation):
    """Joins every `len(sizes)` arrays along an axis: gate and up become one array."""

    axis: int
    sizes: tuple[int, ...]
    """The size of each array along the axis, so that the result can be cut again."""

    def apply(self, arrays: Sequence[LazyArray]) -> list[LazyArray]:
        """One array for each run of `len(sizes)` arrays."""
        return [self._joined(run) for run in _runs(arrays, len(self.sizes), self)]

    def reverse(self) -> Split:
        """Cuts the array into the parts again."""
        return Split(self.axis, self.sizes)

    def _joined(self, run: Sequence[LazyArray]) -> LazyArray:
        shape = run[0].shape
        for array, size in zip(run, self.sizes, strict=True):
            _require_axis(array.shape, self.axis, self)
            want = _with_size(shape, self.axis, size)
            _require(array.shape == want, f"shape {array.shape} must be {want} for {self}")

        def fill(out: np.ndarray, index: Index) -> None:
            wanted, stop = index[self.axis], 0
            for array, size in zip(run, self.sizes, strict=True):
                start, stop = stop, stop + size
                first, last = max(wanted.start, start), min(wanted.stop, stop)
                if first < last:
                    place = _at(self.axis, slice(first - wanted.start, last - wanted.start))
                    array.fill(out[place], _with_slice(index, self.axis, slice(first - start, last - start)))

        return LazyArray(_with_size(shape, self.axis, sum(self.sizes)), _common_dtype(run), fill)


@dataclasses.dataclass(frozen=True)
class Stack(Operation):
    """Makes one array of every `count` arrays of one shape, along a new axis: the experts of a layer."""

    count: int
    axis: int = 0

    def apply(self, arrays: Sequence[LazyArray]) -> list[LazyArray]:
        """One array for each run of `count` arrays."""
        return [self._stacked(run) for run in _runs(arrays, self.count, self)]

    def reverse(self) -> "Unstack":
        """Takes the arrays apart again."""
        return Unstack(self.count, self.axis)

    def _stacked(self, run: Sequence[LazyArray]) -> LazyArray:
        shape = run[0].shape
        _require(len({array.shape for array in run}) == 1, f"shapes {[a.shape for a in run]} must be equal for {self}")
        _require(0 <= self.axis <= len(shape), f"axis={self.axis} must be in 0..{len(shape)} for shape {shape}")

        def fill(out: np.ndarray, index: Index) -> None:
            wanted, rest = index[self.axis], (*index[: self.axis], *index[self.axis + 1 :])
            for place, array in enumerate(run[wanted]):
                array.fill(out[_at(self.axis, place)], rest)

        return LazyArray((*shape[: self.axis], self.count, *shape[self.axis :]), _common_dtype(run), fill)


@dataclasses.dataclass(frozen=True)
class Unstack(Operation):
    """Takes an array apart along an axis of size `count`, which its parts no longer have."""

    count: int
    axis: int = 0

    def apply(self, arrays: Sequence[LazyArray]) -> list[LazyArray]:
        """The parts of the first array, then those of the second, and so on."""
        for array in arrays:
            _require_size(array.shape, self.axis, self.count, self)
        return [self._one(array, place) for array in arrays for place in range(self.count)]

    def reverse(self) -> Stack:
        """Stacks the parts again."""
        return Stack(self.count, self.axis)

    def _one(self, array: LazyArray, place: int) -> LazyArray:
        def fill(out: np.ndarray, index: Index) -> None:
            whole = (*index[: self.axis], slice(place, place + 1), *index[self.axis :])
            array.fill(np.expand_dims(out, self.axis), whole)

        return LazyArray((*array.shape[: self.axis], *array.shape[self.axis + 1 :]), array.dtype, fill)


@dataclasses.dataclass(frozen=True)
class Deinterleave(Operation):
    """Takes apart arrays whose last axis has the entries of `count` arrays in turn: gate, up, gate, up, ..."""

    count: int

    def apply(self, arrays: Sequence[LazyArray]) -> list[LazyArray]:
        """The parts of the first array, then those of the second, and so on."""
        for array in arrays:
            fits = len(array.shape) > 0 and array.shape[-1] % self.count == 0
            _require(fits, f"the last axis of {array.shape} must be a multiple of {self.count} for {self}")
        return [self._one(array, place) for array in arrays for place in range(self.count)]

    def reverse(self) -> "Interleave":
        """Joins the parts again."""
        return Interleave(self.count)

    def _one(self, array: LazyArray, place: int) -> LazyArray:
        def fill(out: np.ndarray, index: Index) -> None:
            *rest, last = index
            turns = array.read((*rest, slice(self.count * last.start, self.count * last.stop)), out.dtype)
            out[...] = turns[..., place :: self.count]

        return LazyArray((*array.shape[:-1], array.shape[-1] // self.count), array.dtype, fill)


@dataclasses.dataclass(frozen=True)
class Interleave(Operation):
    """Joins every `count` arrays of one shape into one whose last axis has their entries in turn."""

    count: int

    def apply(self, arrays: Sequence[LazyArray]) -> list[LazyArray]:
        """One array for each run of `count` arrays."""
        return [self._joined(run) for run in _runs(arrays, self.count, self)]

    def reverse(self) -> Deinterleave:
        """Takes the arrays apart again."""
        return Deinterleave(self.count)

    def _joined(self, run: Sequence[LazyArray]) -> LazyArray:
        shape = run[0].shape
        equal = len(shape) > 0 and len({array.shape for array in run}) == 1
        _require(equal, f"shapes {[array.shape for array in run]} must be equal, with an axis, for {self}")

        def fill(out: np.ndarray, index: Index) -> None:
            *rest, last = index
            for place, array in enumerate(run):  # which has the entries place, place + count, ... of the last axis
                first, stop = (-(-(bound - place) // self.count) for bound in (last.start, last.stop))
                if first < stop:
                    start = first * self.count + place - last.start
                    array.fill(out[..., start :: self.count], (*rest, slice(first, stop)))

        whole = (*shape[:-1], shape[len(shape) - 1] * self.count)
        return LazyArray(whole, _common_dtype(run), fill)


@dataclasses.dataclass(frozen=True)
class Add(Operation):
    """Adds a number, in the array's own type: llama.cpp stores some norms' `w` as `1 + w`.

    The reverse gives the same bits wherever the type holds the sum exactly, as it does for what llama.cpp stores.
    """

    value: float

    def apply(self, arrays: Sequence[LazyArray]) -> list[LazyArray]:
        """The sums."""
        return [self._sum(array) for array in arrays]

    def reverse(self) -> "Add":
        """Subtracts the number."""
        return Add(-self.value)

    def _sum(self, array: LazyArray) -> LazyArray:
        def fill(out: np.ndarray, index: Index) -> None:
            out[...] = array.read(index) + array.dtype.type(self.value)

        return dataclasses.replace(array, fill=fill)


def _permuted(array: LazyArray, axes: tuple[int, ...]) -> LazyArray:
    """The array with its axes in another order. A part is written through a transposed view of its place."""
    back = _inverse(axes)

    def fill(out: np.ndarray, index: Index) -> None:
        array.fill(out.transpose(back), tuple(index[axis] for axis in back))

    return LazyArray(tuple(array.shape[axis] for axis in axes), array.dtype, fill)


def _part(array: LazyArray, axis: int, first: int, size: int) -> LazyArray:
    """The `size` entries from `first` on, along an axis."""

    def fill(out: np.ndarray, index: Index) -> None:
        wanted = index[axis]
        array.fill(out, _with_slice(index, axis, slice(first + wanted.start, first + wanted.stop)))

    return LazyArray(_with_size(array.shape, axis, size), array.dtype, fill)


def _runs(arrays: Sequence[_T], length: int, operation: Operation) -> list[Sequence[_T]]:
    given = len(arrays)
    _require(given > 0 and given % length == 0, f"{given} arrays must be a multiple of {length} for {operation}")
    return [arrays[start : start + length] for start in range(0, given, length)]


def _common_dtype(arrays: Sequence[LazyArray]) -> np.dtype:
    """A type that holds the numbers of all; a file may mix types, so this promotes where jax is told not to."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, (array.dtype for array in arrays))


def _require_axis(shape: Shape, axis: int, operation: Operation) -> None:
    _require(0 <= axis < len(shape), f"shape {shape} has no axis {axis} for {operation}")


def _require_size(shape: Shape, axis: int, size: int, operation: Operation) -> None:
    _require_axis(shape, axis, operation)
    _require(shape[axis] == size, f"axis {axis} of {shape} must have size {size}")


def _inverse(axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(axes.index(axis) for axis in range(len(axes)))


def _with_size(shape: Shape, axis: int, size: int) -> Shape:
    return (*shape[:axis], size, *shape[axis + 1 :])


def _with_slice(index: Index, axis: int, part: slice) -> Index:
    return (*index[:axis], part, *index[axis + 1 :])


def _at(axis: int, place: Any) -> tuple[Any, ...]:
    """Selects from one axis, as a view."""
    return (*(slice(None),) * axis, place, ...)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
