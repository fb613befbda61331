"""When requests become known to the scheduler."""

from collections.abc import Sequence

import numpy as np

from paged_attn_layer._src.engine import checks


def checked_arrivals(arrivals: Sequence[int] | None, n: int) -> list[int]:
    """Returns one step number for each of `n` requests; 0 for all if `arrivals` is `None`.

    Raises:
        ValueError: there is not one for each, or one is no whole number of at least 0.
    """
    if arrivals is None:
        return [0] * n
    if not isinstance(arrivals, Sequence | np.ndarray):
        raise ValueError(f"arrivals={arrivals!r} must be a list of step numbers, one a request")
    if len(arrivals) != n:
        raise ValueError(f"arrivals has {len(arrivals)} entries; it must have {n}, one a request")
    return [checks.whole_number(f"arrivals[{index}]", arrival, 0) for index, arrival in enumerate(arrivals)]
