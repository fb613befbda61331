"""From stored keys and values to operands of the products, in registers.

What comes out of a type with scales is the stored value over `unit`, a power of two that joins the scale: so int4
needs no sign extension, and float8_e4m3fn is read by hardware that was built for another bias.
"""

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int8, Shaped

from paged_kernels._src.attention.tpu.config import Config, Memory

HIGH_NIBBLES = -0x0F0F0F10
"""The mask 0xF0F0F0F0 as int32."""
NOT_SIGNS = 0x7F7F7F7F
"""All bits of four bytes but the highest of each."""


def unit(c: Config) -> float:
    """What the operands are multiplied by to give stored values."""
    if c.layout.dtype == "int4":
        return 1 / 16
    return 16.0 if _as_b11(c) else 1.0


def load_lanes(rows: Memory, lanes: slice, c: Config) -> Float[Array, "keys lanes"]:
    """The stored rows' `lanes` (whole registers) over `unit`, in the compute type.

    Args:
        rows: a head's rows of some pages, in VMEM, `[pages, page_size, storage_lanes]`.
        lanes: which of `KVLayout.lanes`.
        c: the static facts.
    """
    if c.layout.dtype == "int4":
        return _load_nibbles(rows, lanes, c)
    stored = rows[:, :, lanes]
    return _as_matrix(_e4m3_as_b11(stored) if _as_b11(c) else stored, c)


def _load_nibbles(rows: Memory, lanes: slice, c: Config) -> Float[Array, "keys lanes"]:
    half = c.layout.lanes // 2
    low, high = slice(lanes.start, min(lanes.stop, half)), slice(max(lanes.start - half, 0), lanes.stop - half)
    parts = [low_nibbles(rows[:, :, low])] if low.start < low.stop else []
    parts += [high_nibbles(rows[:, :, high])] if high.start < high.stop else []
    return jnp.concatenate([_as_matrix(part, c) for part in parts], axis=1)


def _as_matrix(x: Shaped[Array, "pages page_size lanes"], c: Config) -> Float[Array, "keys lanes"]:
    return x.reshape(-1, x.shape[2]).astype(c.compute_dtype)


def low_nibbles(x: Int8[Array, "pages page_size lanes"]) -> Int8[Array, "pages page_size lanes"]:
    """Sixteen times the value, -8 to 7, of each byte's low nibble."""
    return pltpu.bitcast((pltpu.bitcast(x, jnp.int32) << 4) & HIGH_NIBBLES, jnp.int8)


def high_nibbles(x: Int8[Array, "pages page_size lanes"]) -> Int8[Array, "pages page_size lanes"]:
    """Sixteen times the value of each byte's high nibble."""
    return pltpu.bitcast(pltpu.bitcast(x, jnp.int32) & HIGH_NIBBLES, jnp.int8)


def _as_b11(c: Config) -> bool:
    return c.layout.dtype == "float8_e4m3fn" and c.reads_e4m3b11


def _e4m3_as_b11(x: Shaped[Array, "pages page_size lanes"]) -> Shaped[Array, "pages page_size lanes"]:
    """The same numbers over 16, as float8_e4m3b11fnuz: the same bits, but for the bits of -0, which are its NaN.

    A NaN becomes a number; quantised rows have theirs in the scale.
    """
    bits = pltpu.bitcast(x, jnp.int32)
    no_zero = (bits & NOT_SIGNS) + NOT_SIGNS  # carries into a byte's highest bit where any other bit is set
    return pltpu.bitcast(bits & (no_zero | NOT_SIGNS), jnp.float8_e4m3b11fnuz)
