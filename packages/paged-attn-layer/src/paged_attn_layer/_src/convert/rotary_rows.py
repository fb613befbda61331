"""Operations that reorder the rows of heads, for the two orders in which rotary embedding has its pairs."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from paged_attn_layer._src.convert.lazy import Index, LazyArray, full_index
from paged_attn_layer._src.convert.operations import Operation


@dataclasses.dataclass(frozen=True)
class RotaryPairsToHalves(Operation):
    """Reorders the rows of each head for rotary embedding that pairs entry `i` with `i + head_dim / 2`.

    Before, the two entries of a pair lie beside each other: `2 i` and `2 i + 1`. Rows are axis 0, heads in turn.
    """

    heads: int

    def apply(self, arrays: Sequence[LazyArray]) -> list[LazyArray]:
        """Each array with its rows in the new order."""
        return [_regrouped(array, self.heads, (self.heads, -1, 2)) for array in arrays]

    def reverse(self) -> "RotaryHalvesToPairs":
        """The order that has pairs beside each other."""
        return RotaryHalvesToPairs(self.heads)


@dataclasses.dataclass(frozen=True)
class RotaryHalvesToPairs(Operation):
    """Reorders the rows of each head for rotary embedding that pairs entry `2 i` with `2 i + 1`.

    Before, the entries of a pair are `i` and `i + head_dim / 2`. Rows are axis 0, heads in turn.
    """

    heads: int

    def apply(self, arrays: Sequence[LazyArray]) -> list[LazyArray]:
        """Each array with its rows in the new order."""
        return [_regrouped(array, self.heads, (self.heads, 2, -1)) for array in arrays]

    def reverse(self) -> RotaryPairsToHalves:
        """The order that has the halves of a head apart."""
        return RotaryPairsToHalves(self.heads)


def _regrouped(array: LazyArray, heads: int, groups: tuple[int, int, int]) -> LazyArray:
    """The array with its rows grouped, and the last two of the three axes of groups swapped. Reads all rows."""
    fits = len(array.shape) > 0 and array.shape[0] % (2 * heads) == 0
    if not fits:
        raise ValueError(f"axis 0 of {array.shape} must be a multiple of {2 * heads}: {heads} heads of an even size")

    def fill(out: np.ndarray, index: Index) -> None:
        rows = array.read((*full_index(array.shape[:1]), *index[1:]), out.dtype)
        grouped = np.swapaxes(rows.reshape(*groups, *rows.shape[1:]), 1, 2)
        out[...] = grouped.reshape(rows.shape)[index[0]]

    return dataclasses.replace(array, fill=fill)
