"""Turns stored keys and values into operands of the products, in registers.

Quantised values come out divided by `unit`, a power of two that is then part of the scale. So int4 needs no sign
extension, and hardware built for another exponent bias can read float8_e4m3fn.
"""

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int8, Shaped

from paged_kernels._src.attention.tpu.config import Config, Memory

HIGH_NIBBLES = -0x0F0F0F10
"""The mask 0xF0F0F0F0 as int32."""
NOT_SIGNS = 0x7F7F7F7F
"""Four bytes, each with all bits set except the highest."""


def unit(c: Config) -> float:
    """The factor that turns operands back into stored values."""
    if c.layout.dtype == "int4":
        return 1 / 16
    return 16.0 if _as_b11(c) else 1.0


def load_lanes(entries: Memory, lanes: slice, c: Config) -> Float[Array, "keys lanes"]:
    """Returns `lanes` of the stored entries, divided by `unit`, in the compute type.

    Args:
        entries: one head's entries of some pages, in VMEM, `[pages, page_size, storage_lanes]`.
        lanes: a slice of whole registers, within `KVLayout.lanes`.
        c: the static facts.
    """
    if c.layout.dtype == "int4":
        return _load_nibbles(entries, lanes, c)
    stored = entries[:, :, lanes]
    return _as_matrix(_e4m3_as_b11(stored) if _as_b11(c) else stored, c)


def _load_nibbles(entries: Memory, lanes: slice, c: Config) -> Float[Array, "keys lanes"]:
    half = c.layout.lanes // 2
    low, high = slice(lanes.start, min(lanes.stop, half)), slice(max(lanes.start - half, 0), lanes.stop - half)
    parts = [low_nibbles(entries[:, :, low])] if low.start < low.stop else []
    parts += [high_nibbles(entries[:, :, high])] if high.start < high.stop else []
    return jnp.concatenate([_as_matrix(part, c) for part in parts], axis=1)


def _as_matrix(x: Shaped[Array, "pages page_size lanes"], c: Config) -> Float[Array, "keys lanes"]:
    return x.reshape(-1, x.shape[2]).astype(c.compute_dtype)


def low_nibbles(x: Int8[Array, "pages page_size lanes"]) -> Int8[Array, "pages page_size lanes"]:
    """Sixteen times each byte's low nibble, read as -8 to 7."""
    return pltpu.bitcast((pltpu.bitcast(x, jnp.int32) << 4) & HIGH_NIBBLES, jnp.int8)


def high_nibbles(x: Int8[Array, "pages page_size lanes"]) -> Int8[Array, "pages page_size lanes"]:
    """Sixteen times each byte's high nibble, read as -8 to 7."""
    return pltpu.bitcast(pltpu.bitcast(x, jnp.int32) & HIGH_NIBBLES, jnp.int8)


def _as_b11(c: Config) -> bool:
    return c.layout.dtype == "float8_e4m3fn" and c.reads_e4m3b11


def _e4m3_as_b11(x: Shaped[Array, "pages page_size lanes"]) -> Shaped[Array, "pages page_size lanes"]:
    """The same numbers divided by 16, as float8_e4m3b11fnuz.

    The bits stay the same, except for -0, whose bits mean NaN there. A stored NaN becomes a number: quantised entries
    keep their NaN in the scale.
    """
    bits = pltpu.bitcast(x, jnp.int32)
    no_zero = (bits & NOT_SIGNS) + NOT_SIGNS  # a byte's highest bit is 1 if any of its other bits is 1
    return pltpu.bitcast(bits & (no_zero | NOT_SIGNS), jnp.float8_e4m3b11fnuz)
