"""Reversible changes of weights between a checkpoint's form and ours.

An operation takes a list of arrays and returns a list of arrays. Its `reverse()` is the operation that undoes it, bit
for bit. Its `shapes` are those of the arrays that `apply` returns, known without any array.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Shape = tuple[int, ...]

_T = TypeVar("_T")


class Operation(abc.ABC):
    """A reversible change of a list of arrays."""

    @abc.abstractmethod
    def apply(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The changed arrays: views where numpy can make them."""

    @abc.abstractmethod
    def shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        """The shapes of what `apply` returns for arrays of these shapes.

        Raises:
            ValueError: the operation does not fit these shapes.
        """

    @abc.abstractmethod
    def reverse(self) -> "Operation":
        """The operation that undoes this one."""


def apply_all(operations: Sequence[Operation], arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The arrays after all operations, in turn."""
    return functools.reduce(lambda values, operation: operation.apply(values), operations, list(arrays))


def shapes_after_all(operations: Sequence[Operation], shapes: Sequence[Shape]) -> list[Shape]:
    """The shapes of what `apply_all` returns.

    Raises:
        ValueError: an operation does not fit these shapes.
    """
    return functools.reduce(lambda values, operation: operation.shapes(values), operations, list(shapes))


def reverse_all(operations: Sequence[Operation]) -> tuple[Operation, ...]:
    """The operations that undo these ones: the reverse of each, last one first."""
    return tuple(operation.reverse() for operation in reversed(operations))


@dataclasses.dataclass(frozen=True)
class Transpose(Operation):
    """Swaps the last two axes: a matrix `[out, in]` becomes `[in, out]`."""

    def apply(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Each array with its last two axes swapped."""
        return [np.swapaxes(array, -1, -2) for array in arrays]

    def shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        """Each shape with its last two sizes swapped."""
        for shape in shapes:
            _require(len(shape) >= 2, f"shape {shape} must have at least 2 axes to be transposed")
        return [(*shape[:-2], shape[-1], shape[-2]) for shape in shapes]

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

    def apply(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Each array with its axes in the new order."""
        return [np.transpose(array, self.axes) for array in arrays]

    def shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        """Each shape in the new order."""
        for shape in shapes:
            _require(len(shape) == len(self.axes), f"shape {shape} must have {len(self.axes)} axes for {self}")
        return [tuple(shape[axis] for axis in self.axes) for shape in shapes]

    def reverse(self) -> "Permute":
        """The permutation that puts every axis back."""
        return Permute(tuple(self.axes.index(axis) for axis in range(len(self.axes))))


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

    def apply(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Each array in its new shape."""
        return [array.reshape(self.after) for array in arrays]

    def shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        """`after`, for each array."""
        for shape in shapes:
            _require(shape == self.before, f"shape {shape} must be {self.before} for {self}")
        return [self.after] * len(shapes)

    def reverse(self) -> "Reshape":
        """The change back."""
        return Reshape(self.after, self.before)


@dataclasses.dataclass(frozen=True)
class Split(Operation):
    """Cuts each array into parts along an axis: a fused Q, K, V becomes three arrays."""

    axis: int
    sizes: tuple[int, ...]
    """The size of each part along the axis."""

    def apply(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The parts of the first array, then those of the second, and so on."""
        ends = np.cumsum(self.sizes)[:-1]
        return [part for array in arrays for part in np.split(array, ends, axis=self.axis)]

    def shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        """The shapes of the parts, in the same order."""
        for shape in shapes:
            _require_axis(shape, self.axis, self)
            _require(
                shape[self.axis] == sum(self.sizes), f"axis {self.axis} of {shape} must have size {sum(self.sizes)}"
            )
        return [_with_size(shape, self.axis, size) for shape in shapes for size in self.sizes]

    def reverse(self) -> "Concat":
        """Joins the parts."""
        return Concat(self.axis, self.sizes)


@dataclasses.dataclass(frozen=True)
class Concat(Operation):
    """Joins every `len(sizes)` arrays along an axis: gate and up become one array."""

    axis: int
    sizes: tuple[int, ...]
    """The size of each array along the axis, so that the result can be cut again."""

    def apply(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """One array for each run of `len(sizes)` arrays."""
        return [np.concatenate(run, axis=self.axis) for run in _runs(arrays, len(self.sizes))]

    def shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        """The shape of each joined array."""
        _require_runs(len(shapes), len(self.sizes), self)
        return [self._joined(run) for run in _runs(shapes, len(self.sizes))]

    def reverse(self) -> Split:
        """Cuts the array into the parts again."""
        return Split(self.axis, self.sizes)

    def _joined(self, run: Sequence[Shape]) -> Shape:
        for shape, size in zip(run, self.sizes, strict=True):
            _require_axis(shape, self.axis, self)
            want = _with_size(run[0], self.axis, size)
            _require(shape == want, f"shape {shape} must be {want} for {self}")
        return _with_size(run[0], self.axis, sum(self.sizes))


@dataclasses.dataclass(frozen=True)
class Stack(Operation):
    """Makes one array of every `count` arrays of one shape, along a new axis: the experts of a layer."""

    count: int
    axis: int = 0

    def apply(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """One array for each run of `count` arrays."""
        return [np.stack(run, axis=self.axis) for run in _runs(arrays, self.count)]

    def shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        """The shape of each stacked array."""
        _require_runs(len(shapes), self.count, self)
        return [self._stacked(run) for run in _runs(shapes, self.count)]

    def reverse(self) -> "Unstack":
        """Takes the arrays apart again."""
        return Unstack(self.count, self.axis)

    def _stacked(self, run: Sequence[Shape]) -> Shape:
        _require(len(set(run)) == 1, f"shapes {list(run)} must be equal for {self}")
        _require(0 <= self.axis <= len(run[0]), f"axis={self.axis} must be in 0..{len(run[0])} for shape {run[0]}")
        return (*run[0][: self.axis], self.count, *run[0][self.axis :])


@dataclasses.dataclass(frozen=True)
class Unstack(Operation):
    """Takes an array apart along an axis of size `count`, which its parts no longer have."""

    count: int
    axis: int = 0

    def apply(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The parts of the first array, then those of the second, and so on."""
        return [part for array in arrays for part in np.moveaxis(array, self.axis, 0)]

    def shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        """The shapes of the parts, in the same order."""
        for shape in shapes:
            _require_axis(shape, self.axis, self)
            _require(shape[self.axis] == self.count, f"axis {self.axis} of {shape} must have size {self.count}")
        return [(*s[: self.axis], *s[self.axis + 1 :]) for s in shapes for _ in range(self.count)]

    def reverse(self) -> Stack:
        """Stacks the parts again."""
        return Stack(self.count, self.axis)


@dataclasses.dataclass(frozen=True)
class RotaryPairsToHalves(Operation):
    """Reorders the rows of each head for rotary embedding that pairs entry `i` with `i + head_dim / 2`.

    Before, the two entries of a pair lie beside each other: `2 i` and `2 i + 1`. Rows are axis 0, heads in turn.
    """

    heads: int

    def apply(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Each array with its rows in the new order."""
        return [_regroup_rows(array, (self.heads, -1, 2)) for array in arrays]

    def shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        """The same shapes."""
        return _require_pairs(shapes, self.heads)

    def reverse(self) -> "RotaryHalvesToPairs":
        """The order that has pairs beside each other."""
        return RotaryHalvesToPairs(self.heads)


@dataclasses.dataclass(frozen=True)
class RotaryHalvesToPairs(Operation):
    """Reorders the rows of each head for rotary embedding that pairs entry `2 i` with `2 i + 1`.

    Before, the entries of a pair are `i` and `i + head_dim / 2`. Rows are axis 0, heads in turn.
    """

    heads: int

    def apply(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Each array with its rows in the new order."""
        return [_regroup_rows(array, (self.heads, 2, -1)) for array in arrays]

    def shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        """The same shapes."""
        return _require_pairs(shapes, self.heads)

    def reverse(self) -> RotaryPairsToHalves:
        """The order that has the halves of a head apart."""
        return RotaryPairsToHalves(self.heads)


def _regroup_rows(array: np.ndarray, groups: tuple[int, int, int]) -> np.ndarray:
    rows = array.reshape(*groups, *array.shape[1:])
    return np.swapaxes(rows, 1, 2).reshape(array.shape)


def _require_pairs(shapes: Sequence[Shape], heads: int) -> list[Shape]:
    for shape in shapes:
        fits = len(shape) > 0 and shape[0] % (2 * heads) == 0
        _require(fits, f"axis 0 of {shape} must be a multiple of {2 * heads}: {heads} heads of an even size")
    return list(shapes)


def _runs(items: Sequence[_T], length: int) -> list[Sequence[_T]]:
    return [items[start : start + length] for start in range(0, len(items), length)]


def _require_runs(given: int, length: int, operation: Operation) -> None:
    _require(given > 0 and given % length == 0, f"{given} arrays must be a multiple of {length} for {operation}")


def _require_axis(shape: Shape, axis: int, operation: Operation) -> None:
    _require(0 <= axis < len(shape), f"shape {shape} has no axis {axis} for {operation}")


def _with_size(shape: Shape, axis: int, size: int) -> Shape:
    return (*shape[:axis], size, *shape[axis + 1 :])


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
