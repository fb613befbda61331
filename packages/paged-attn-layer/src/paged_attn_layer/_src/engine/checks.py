"""Checks of what users ask for: an error here names the argument; one inside a step would hit every request."""

import math
import numbers
import operator
from collections.abc import Collection, Iterable, Mapping, Set
from typing import Any

import numpy as np


def whole_number(name: str, value: Any, least: int) -> int:
    """Returns `value` as a Python int.

    Raises:
        ValueError: it is no whole number (bools, floats and strings are none), or it is below `least`.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}") from None
    if number < least:
        raise ValueError(f"{name}={value!r} must be at least {least}")
    return number


def real_number(name: str, value: Any, least: float, most: float) -> float:
    """Returns `value` as a Python float.

    Raises:
        ValueError: it is no number (bools and strings are none), is NaN, or lies outside `least..most`.
    """
    real = isinstance(value, numbers.Real | np.number) and not isinstance(value, bool)
    number = float(value) if real else math.nan  # pyright: ignore[reportArgumentType]
    if not least <= number <= most:
        raise ValueError(f"{name}={value!r} must be a number in {least:g}..{most:g}")
    return number


def token_ids(
    name: str, values: Any, vocab_size: int | None = None, remedy: str = "", *, ordered: bool = True
) -> list[int]:
    """Returns token ids as a list of Python ints.

    Args:
        name: what holds them, for the error.
        values: a list, a tuple, a range or an array of them.
        vocab_size: the number of tokens that there are; `None`: not known here.
        remedy: what to do about an id that does not exist, for the error.
        ordered: true if the order counts, so that a set is refused.

    Raises:
        ValueError: `values` is something else, or an entry is no id of the vocabulary.
    """
    unordered = isinstance(values, Set) and ordered
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable) or unordered:
        raise ValueError(f"{name}={values!r} must be a list of token ids")
    ids = []
    for index, value in enumerate(values):
        try:
            ids.append(whole_number("", value, 0))
        except ValueError:
            ids.append(-1)
        if ids[-1] < 0 or (vocab_size is not None and ids[-1] >= vocab_size):
            must = "be a whole number of at least 0" if vocab_size is None else f"lie in 0..{vocab_size - 1}"
            raise ValueError(f"token {index} of {name} is {value!r}; it must {must}{remedy}") from None
    return ids


def text(name: str, value: Any) -> str:
    """Returns `value`, a text that can be encoded.

    Raises:
        ValueError: it is no `str`, or holds half of a surrogate pair, which no UTF-8 text has.
    """
    if not isinstance(value, str):
        raise ValueError(f"{name}={value!r} must be a str")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has half of a surrogate pair at character {error.start}; it must be text that UTF-8 can encode"
        ) from None
    return value


def stop_strings(value: Any) -> tuple[str, ...]:
    """Returns stop strings as a tuple; one string is one of them.

    Raises:
        ValueError: an entry is no `str`, is empty, or holds half of a surrogate pair.
    """
    if isinstance(value, str):
        value = (value,)
    if isinstance(value, bytes | Mapping) or not isinstance(value, Collection):
        raise ValueError(f"stop={value!r} must be a str or a list of them")
    for index, entry in enumerate(value):
        if not isinstance(entry, str) or not entry:
            raise ValueError(f"stop[{index}]={entry!r} must be a str of at least one character")
        text(f"stop[{index}]", entry)
    return tuple(value)


def flag(name: str, value: Any) -> bool | None:
    """Returns `value`: True, False or None.

    Raises:
        ValueError: it is something else, such as the text "no", which counts as true.
    """
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be True, False or None")
    return value
