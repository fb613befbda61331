"""That they undo each other, and what they refuse, is tested with all operations in `test_operations.py`."""

import numpy as np

from paged_attn_layer._src.convert.lazy import LazyArray
from paged_attn_layer._src.convert.rotary_rows import RotaryHalvesToPairs, RotaryPairsToHalves


def reordered(operation, rows):
    return operation.apply([LazyArray.of(np.arange(rows))])[0].read()


def test_rows_of_two_heads():
    """Four rows a head: pairs (0, 1) and (2, 3) become (0, 2) and (1, 3)."""
    np.testing.assert_array_equal(reordered(RotaryPairsToHalves(2), 8), [0, 2, 1, 3, 4, 6, 5, 7])
    np.testing.assert_array_equal(reordered(RotaryHalvesToPairs(2), 12)[:6], [0, 3, 1, 4, 2, 5])
