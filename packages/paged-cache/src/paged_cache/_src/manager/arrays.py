"""Small numpy helpers that are fast for arrays of a few hundred numbers.

At that size `argmax` and `argmin` take a third of the time of `max`, `min` and `any`, which are ufuncs.
"""

import numpy as np


def first_true(wrong: np.ndarray) -> int | None:
    """Index of the first true entry; `None` if there is none."""
    at = int(wrong.argmax()) if wrong.size else 0
    return at if wrong.size and wrong[at] else None


def least(numbers: np.ndarray, if_none: int) -> int:
    """The smallest number; `if_none` for an empty array."""
    return int(numbers[numbers.argmin()]) if numbers.size else if_none


def most(numbers: np.ndarray, if_none: int) -> int:
    """The largest number; `if_none` for an empty array."""
    return int(numbers[numbers.argmax()]) if numbers.size else if_none


def runs(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The ranges `starts[i] .. starts[i] + counts[i] - 1` of all `i`, one after the other; at least one range.

    >>> runs(np.array([7, 0]), np.array([1, 3])).tolist()
    [7, 0, 1, 2]
    """
    ends = np.cumsum(counts)
    return np.repeat(starts - ends + counts, counts) + np.arange(ends[-1])


def ragged(indices: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pairs `(indices[i], starts[i] + j)` for all `j < counts[i]`, as two arrays: a numpy index of a 2-d array.

    >>> ragged(np.array([7, 9]), np.array([4, 0]), np.array([2, 3]))
    (array([7, 7, 9, 9, 9]), array([4, 5, 0, 1, 2]))
    """
    if least(counts, if_none=1) == most(counts, if_none=1) == 1:  # a decode step
        return indices, starts
    return np.repeat(indices, counts), runs(starts, counts)
