"""Merges new rows into old ones in vector registers. Bits are moved and selected, never computed with.

A vector register holds 32-bit words. A word holds `packing` rows of a narrower type: for bfloat16, row `2w` is the low
half of word `w`, and row `2w + 1` the high half. The code does not depend on what the bits mean, so a NaN keeps its
payload.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32, Shaped

Scalar = Int32[Array, ""] | int
Words = Int32[Array, "words lanes"]


def merge_rows(
    old: Shaped[Array, "slots lanes"], strip: Shaped[Array, "strip lanes"], *, first: Scalar, end: Scalar, shift: Scalar
) -> Shaped[Array, "slots lanes"]:
    """Returns `old` with slots `first <= s < end` replaced from `strip`.

    Slot `s` gets row `(s - shift) mod len(strip)`. The strip has at least as many rows as `old`.
    """
    packing = 4 // old.dtype.itemsize
    old_words = pltpu.bitcast(old, jnp.int32)
    new_words = _shift_rows(pltpu.bitcast(strip, jnp.int32), shift, packing)[: old_words.shape[0]]
    mask = _row_mask(old_words.shape, first, end, packing)
    return pltpu.bitcast((old_words & ~mask) | (new_words & mask), old.dtype)


def merge_lanes(
    old: Float[Array, "heads lanes"], strip: Float[Array, "heads strip"], *, first: Scalar, end: Scalar, shift: Scalar
) -> Float[Array, "heads lanes"]:
    """Returns `old` with lanes `first <= l < end` replaced from `strip`.

    Lane `l` gets lane `(l - shift) mod len(strip)`. The strip has at least as many lanes as `old`.
    """
    lane = jax.lax.broadcasted_iota(jnp.int32, old.shape, 1)
    moved = pltpu.roll(strip, shift, axis=1)[:, : old.shape[1]]
    return jnp.where((lane >= first) & (lane < end), moved, old)


def _shift_rows(words: Words, rows: Scalar, packing: int) -> Words:
    """Moves the rows in `words` by `rows >= 0`. Rows that leave at the end return at the front."""
    moved = pltpu.roll(words, rows // packing, axis=0)
    if packing == 1:
        return moved
    # The rest of the shift is less than a word: each word takes some rows from the word before it.
    part = rows % packing
    bits = part * (32 // packing)
    before = pltpu.roll(moved, 1, axis=0)
    return jnp.where(part == 0, moved, (moved << bits) | jax.lax.shift_right_logical(before, 32 - bits))


def _row_mask(shape: tuple[int, ...], first: Scalar, end: Scalar, packing: int) -> Words:
    """Returns words in which exactly the bits of rows `first` to `end` are set."""
    word = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    mask = jnp.zeros(shape, jnp.int32)
    for part in range(packing):
        row = word * packing + part
        mask |= jnp.where((row >= first) & (row < end), _part_bits(part, packing), 0)
    return mask


def _part_bits(part: int, packing: int) -> np.int32:
    """Returns a word in which exactly the bits of its row number `part` are set."""
    bits = 32 // packing
    return np.uint32(((1 << bits) - 1) << (part * bits)).view(np.int32)
