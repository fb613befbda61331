"""What the bookkeeping asks of arrays of some hundred numbers, in calls of numpy that are few and cheap.

For so few, `argmax` and `argmin` cost a third of `max`, `min` and `any`, which go through the machinery of ufuncs.
"""

import numpy as np


def first_true(wrong: np.ndarray) -> int | None:
    """Index of the first true entry, if there is one."""
    at = int(wrong.argmax()) if wrong.size else 0
    return at if wrong.size and wrong[at] else None


def least(numbers: np.ndarray, if_none: int) -> int:
    """The smallest of a list of numbers."""
    return int(numbers[numbers.argmin()]) if numbers.size else if_none


def most(numbers: np.ndarray, if_none: int) -> int:
    """The largest of a list of numbers."""
    return int(numbers[numbers.argmax()]) if numbers.size else if_none


def runs(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """`starts[i], starts[i] + 1, ...`, `counts[i]` of them, for each `i` of at least one, one after the other.

    >>> runs(np.array([7, 0]), np.array([1, 3])).tolist()
    [7, 0, 1, 2]
    """
    ends = np.cumsum(counts)
    return np.repeat(starts - ends + counts, counts) + np.arange(ends[-1])


def ragged(indices: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each row as often as it counts, beside the numbers `start .. start + count - 1`.

    >>> ragged(np.array([7, 9]), np.array([4, 0]), np.array([2, 3]))
    (array([7, 7, 9, 9, 9]), array([4, 5, 0, 1, 2]))
    """
    if least(counts, if_none=1) == most(counts, if_none=1) == 1:  # a decode step
        return indices, starts
    return np.repeat(indices, counts), runs(starts, counts)
