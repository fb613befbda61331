"""A few rows out of many features, in which every two features meet: most faults need no more than two features."""

import itertools
from collections.abc import Callable, Hashable, Sequence

Row = dict[str, Hashable]
Pair = tuple[tuple[str, Hashable], tuple[str, Hashable]]


def pairwise(factors: dict[str, Sequence], allowed: Callable[[Row], bool] = lambda row: True) -> list[Row]:
    """Returns rows with one value per factor. Every two values that may meet do so in some row.

    Greedy: each row starts with a missing pair. For each other factor it takes the value that adds the most missing
    pairs.

    Args:
        factors: the values of each factor.
        allowed: true if the values of a row, which may be incomplete, may meet.
    """
    missing = dict.fromkeys(pair for pair in all_pairs(factors) if allowed(dict(pair)))
    rows = []
    while missing:
        row = dict(next(iter(missing)))
        for name in [name for name in factors if name not in row]:
            row[name] = max(
                (value for value in factors[name] if allowed({**row, name: value})),
                key=lambda value: sum(pair in missing for pair in pairs_of({**row, name: value}, factors)),
            )
        for pair in pairs_of(row, factors):
            missing.pop(pair, None)
        rows.append({name: row[name] for name in factors})
    return rows


def all_pairs(factors: dict[str, Sequence]) -> list[Pair]:
    """Every two values of two factors."""
    return [((a, x), (b, y)) for a, b in itertools.combinations(factors, 2) for x in factors[a] for y in factors[b]]


def pairs_of(row: Row, factors: dict[str, Sequence]) -> list[Pair]:
    """Every two values of a row, which may be incomplete."""
    return list(itertools.combinations([(name, row[name]) for name in factors if name in row], 2))
