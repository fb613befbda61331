"""How one token's key and value are stored in a page: lanes, types and scales."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from paged_kernels._src.integers import round_up
from paged_kernels._src.tpu.registers import LANES

PLAIN_DTYPES = ("float32", "bfloat16", "float16", "float64")
LARGEST = {"int8": 127.0, "int4": 7.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
"""The types that need scales, and the largest magnitude that each can store."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVLayout:
    """The layout of an entry: what one token and one KV head store in a page.

    K and V lie side by side in whole registers. A latent entry is one vector that is both.

        packed     | k k k k v v v v |                  head size 64: K and V share a register of 128 lanes
        aligned    | k k k k k . . . | v v v v v . . . | 80, 96: V starts a register, `.` is zero
        latent     | k k k k k k k k | k . . . . . . . | multi-head latent attention: V is the first lanes of K

    V follows K directly if that takes fewer registers than starting a new one. Types below 16 bits have float32 scales,
    one for each K and one for each V: `value = stored * scale`, with `scale = max |value| / largest`.
    """

    k_dim: int
    """The size of a key, and of a query."""
    v_dim: int
    """The size of a value, and of an output row."""
    dtype: str
    """The type of the stored values. int4 is stored two values to a byte, in whole registers of 128 bytes.

    So int4 takes about half the bytes of int8 at head sizes above 64. At 64 and below both fill one register.
    """
    latent: bool = False
    """True if V is the first `v_dim` lanes of K (DeepSeek-V2, arXiv 2405.04434)."""

    def __post_init__(self) -> None:
        for name, size in (("head_dim", self.k_dim), ("v_head_dim", self.v_dim)):
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        if self.latent and self.v_dim > self.k_dim:
            raise ValueError(
                f"v_head_dim={self.v_dim} must be at most head_dim={self.k_dim}: a latent V is the start of K"
            )

    @classmethod
    def create(cls, head_dim: int, dtype: DTypeLike, *, v_head_dim: int | None = None, latent: bool = False):
        """Returns the layout for these sizes. By default V is as long as K.

        Raises:
            ValueError: a size is below 1, or pages cannot have this `dtype`.
        """
        name = check_dtype(dtype)
        v_dim = head_dim if v_head_dim is None else v_head_dim
        return cls(k_dim=head_dim, v_dim=v_dim, dtype=name, latent=latent)

    @property
    def is_quantised(self) -> bool:
        """True if values have scales."""
        return self.dtype in LARGEST

    @property
    def scales_per_entry(self) -> int:
        """The number of scales of one entry: two for K and V, one for a latent entry, or none."""
        return (1 if self.latent else 2) if self.is_quantised else 0

    def scale_lanes(self, page_size: int) -> int:
        """The lanes of the scales of one page and head: whole registers."""
        return round_up(self.scales_per_entry * page_size, LANES)

    @property
    def v_start(self) -> int:
        """The first lane of V."""
        if self.latent:
            return 0
        k_end = round_up(self.k_dim, LANES)
        apart = k_end + round_up(self.v_dim, LANES)
        return self.k_dim if round_up(self.k_dim + self.v_dim, LANES) < apart else k_end

    @property
    def lanes(self) -> int:
        """The lanes of an entry: whole registers. For int4, whole registers of bytes."""
        end = max(self.k_dim, self.v_start + self.v_dim)
        unit = 2 * LANES if self.dtype == "int4" else LANES
        return round_up(end, unit)

    @property
    def k_lanes(self) -> slice:
        """The registers that hold K. A query must be zero in their other lanes."""
        return slice(0, round_up(self.k_dim, LANES))

    @property
    def v_lanes(self) -> slice:
        """The registers that hold V. The output must drop their other lanes."""
        return slice(self.v_start // LANES * LANES, round_up(self.v_start + self.v_dim, LANES))

    @property
    def storage_lanes(self) -> int:
        """The number of stored elements of an entry."""
        return self.lanes // 2 if self.dtype == "int4" else self.lanes

    @property
    def storage_dtype(self) -> np.dtype:
        """The type of the stored elements."""
        return jnp.dtype(jnp.int8 if self.dtype == "int4" else self.dtype)

    def pack(
        self, k: Float[Array, "*entries k_dim"], v: Float[Array, "*entries v_dim"] | None
    ) -> tuple[Shaped[Array, "*entries storage_lanes"], Float[Array, "*entries scales_per_entry"] | None]:
        """Returns entries as they are stored, rounded to `dtype`, and their scales (`None` without scales)."""
        parts = [(k, 0)] if v is None else [(k, 0), (v, self.v_start)]
        if not self.is_quantised:
            return self._place([(part.astype(self.dtype), start) for part, start in parts]), None
        scales = [scale_of(part, self.dtype) for part, _ in parts]
        stored = [
            (quantise(part, scale, self.dtype), start) for (part, start), scale in zip(parts, scales, strict=True)
        ]
        entries = self._place(stored)
        return _pack_nibbles(entries) if self.dtype == "int4" else entries, jnp.stack(scales, axis=-1)

    def unpack(
        self, entries: Shaped[Array, "*entries storage_lanes"], scales: Float[Array, "*entries scales_per_entry"] | None
    ) -> tuple[Float[Array, "*entries k_dim"], Float[Array, "*entries v_dim"]]:
        """Returns K and V of stored entries; in float32 if they have scales."""
        if scales is not None:
            entries = _unpack_nibbles(entries) if self.dtype == "int4" else entries
            entries = entries.astype(jnp.float32)
        k, v = entries[..., : self.k_dim], entries[..., self.v_start : self.v_start + self.v_dim]
        return (k, v) if scales is None else (k * scales[..., :1], v * scales[..., -1:])

    def _place(self, parts: list[tuple[Array, int]]) -> Array:
        """Puts the parts at their lanes, with zeros between them."""
        placed, end = [], 0
        for part, start in [*parts, (parts[0][0][..., :0], self.lanes)]:
            placed += [jnp.zeros((*part.shape[:-1], start - end), part.dtype), part]
            end = start + part.shape[-1]
        return jnp.concatenate(placed, axis=-1)


def scale_of(x: Float[Array, "*entries dim"], dtype: str) -> Float[Array, "*entries"]:
    """Returns `max |x| / largest` of each key or value, in float32; 1 if all of it is zero.

    If it holds an infinity or a NaN, its scale makes all of it NaN.
    """
    x = jnp.abs(x.astype(jnp.float32))
    total = jnp.sum(x, axis=-1)
    largest = jnp.where(jnp.isnan(total), total, jnp.max(x, axis=-1))  # XLA's max on CPU may drop a NaN
    scale = largest / LARGEST[dtype]
    return jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1, scale)


def quantise(
    x: Float[Array, "*entries dim"], scale: Float[Array, "*entries"], dtype: str
) -> Shaped[Array, "*entries dim"]:
    """Returns `x / scale`, rounded to the nearest value of `dtype`; int4 as one value per byte."""
    largest = LARGEST[dtype]
    y = jnp.clip(x.astype(jnp.float32) / scale[..., None], -largest, largest)
    return jnp.round(y).astype(jnp.int8) if dtype.startswith("int") else y.astype(dtype)


def check_dtype(dtype: DTypeLike) -> str:
    """Returns the name of `dtype`.

    Raises:
        ValueError: pages cannot have this type.
    """
    name = jnp.dtype(dtype).name
    if name not in PLAIN_DTYPES and name not in LARGEST:
        raise ValueError(f"dtype={name} must be one of {', '.join([*PLAIN_DTYPES, *LARGEST])}")
    return name


def _pack_nibbles(entries: Shaped[Array, "*entries lanes"]) -> Shaped[Array, "*entries half_lanes"]:
    """Puts lane `i` in the low nibble of byte `i`, and lane `i + lanes / 2` in the high nibble."""
    half = entries.shape[-1] // 2
    return (entries[..., :half] & 0xF) | (entries[..., half:] << 4)


def _unpack_nibbles(entries: Shaped[Array, "*entries half_lanes"]) -> Shaped[Array, "*entries lanes"]:
    return jnp.concatenate([(entries << 4) >> 4, entries >> 4], axis=-1)
