"""How one token's key and value lie in a row of a page: lanes, types and scales."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from paged_kernels._src.tpu.registers import LANES, round_up

PLAIN_DTYPES = ("float32", "bfloat16", "float16", "float64")
LARGEST = {"int8": 127.0, "int4": 7.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
"""The types that need scales, and the largest magnitude that each stores."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVLayout:
    """The row of one token and one KV head: K and V side by side, or one latent vector for both, in whole registers.

        packed     | k k k k v v v v |                  head size 64: K and V share a register of 128 lanes
        aligned    | k k k k k . . . | v v v v v . . . | 80, 96: V starts a register, `.` is zero
        latent     | k k k k k k k k | k . . . . . . . | multi-head latent attention: V is the first lanes of K

    V follows K directly where that takes fewer registers than giving it its own. Types below 16 bits have scales, one
    for each row of K and one of V, float32: `value = stored * scale`, with `scale = max |value| / largest`.
    """

    k_dim: int
    """Size of a key, and so of a query."""
    v_dim: int
    """Size of a value, and so of an output row."""
    dtype: str
    """Type of the stored values; int4 is stored two to a byte."""
    latent: bool = False
    """Whether V is the first `v_dim` lanes of K (DeepSeek-V2, arXiv 2405.04434)."""

    def __post_init__(self) -> None:
        for name, size in (("head_dim", self.k_dim), ("v_head_dim", self.v_dim)):
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        if self.latent and self.v_dim > self.k_dim:
            raise ValueError(f"v_head_dim={self.v_dim} must be at most head_dim={self.k_dim}: a latent V is K's prefix")

    @classmethod
    def create(cls, head_dim: int, dtype: DTypeLike, *, v_head_dim: int | None = None, latent: bool = False):
        """The row for these sizes; V is as long as K unless said.

        Raises:
            ValueError: a size is below 1, or `dtype` is no type that pages can have.
        """
        name = check_dtype(dtype)
        v_dim = head_dim if v_head_dim is None else v_head_dim
        return cls(k_dim=head_dim, v_dim=v_dim, dtype=name, latent=latent)

    @property
    def is_quantised(self) -> bool:
        """Whether values have scales."""
        return self.dtype in LARGEST

    @property
    def scales_per_entry(self) -> int:
        """Scales of one row: K's and V's, or the latent's, or none."""
        return (1 if self.latent else 2) if self.is_quantised else 0

    def scale_lanes(self, page_size: int) -> int:
        """Lanes of the scales of one page and head: whole registers."""
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
        """Lanes of a row: whole registers, and of int4 whole registers of bytes."""
        end = max(self.k_dim, self.v_start + self.v_dim)
        unit = 2 * LANES if self.dtype == "int4" else LANES
        return round_up(end, unit)

    @property
    def k_lanes(self) -> slice:
        """The registers that hold K; where they hold something else too, the query is to be zero."""
        return slice(0, round_up(self.k_dim, LANES))

    @property
    def v_lanes(self) -> slice:
        """The registers that hold V; what else they hold is to be dropped from the output."""
        return slice(self.v_start // LANES * LANES, round_up(self.v_start + self.v_dim, LANES))

    @property
    def storage_lanes(self) -> int:
        """Elements of a row as it is stored."""
        return self.lanes // 2 if self.dtype == "int4" else self.lanes

    @property
    def storage_dtype(self) -> np.dtype:
        """Type of a row as it is stored."""
        return jnp.dtype(jnp.int8 if self.dtype == "int4" else self.dtype)

    def pack(
        self, k: Float[Array, "*rows k_dim"], v: Float[Array, "*rows v_dim"] | None
    ) -> tuple[Shaped[Array, "*rows storage_lanes"], Float[Array, "*rows scales_per_entry"] | None]:
        """The rows as they are stored, rounded to `dtype`, and their scales (`None` if they have none)."""
        parts = [(k, 0)] if v is None else [(k, 0), (v, self.v_start)]
        if not self.is_quantised:
            return self._place([(part.astype(self.dtype), start) for part, start in parts]), None
        scales = [scale_of(part, self.dtype) for part, _ in parts]
        stored = [
            (quantise(part, scale, self.dtype), start) for (part, start), scale in zip(parts, scales, strict=True)
        ]
        rows = self._place(stored)
        return _pack_nibbles(rows) if self.dtype == "int4" else rows, jnp.stack(scales, axis=-1)

    def unpack(
        self, rows: Shaped[Array, "*rows storage_lanes"], scales: Float[Array, "*rows scales_per_entry"] | None
    ) -> tuple[Float[Array, "*rows k_dim"], Float[Array, "*rows v_dim"]]:
        """K and V of stored rows; float32 where they have scales."""
        if scales is not None:
            rows = _unpack_nibbles(rows) if self.dtype == "int4" else rows
            rows = rows.astype(jnp.float32)
        k, v = rows[..., : self.k_dim], rows[..., self.v_start : self.v_start + self.v_dim]
        return (k, v) if scales is None else (k * scales[..., :1], v * scales[..., -1:])

    def _place(self, parts: list[tuple[Array, int]]) -> Array:
        """The parts at their lanes, zeros between them."""
        placed, end = [], 0
        for part, start in [*parts, (parts[0][0][..., :0], self.lanes)]:
            placed += [jnp.zeros((*part.shape[:-1], start - end), part.dtype), part]
            end = start + part.shape[-1]
        return jnp.concatenate(placed, axis=-1)


def scale_of(x: Float[Array, "*rows dim"], dtype: str) -> Float[Array, "*rows"]:
    """`max |x| / largest` of each row, float32; 1 for a row of zeros.

    A row that holds an infinity or a NaN gets a scale that makes all of it NaN.
    """
    x = jnp.abs(x.astype(jnp.float32))
    largest = jnp.where(jnp.isnan(x).any(axis=-1), jnp.nan, jnp.max(x, axis=-1))  # XLA's max on CPU may drop a NaN
    scale = largest / LARGEST[dtype]
    return jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1, scale)


def quantise(x: Float[Array, "*rows dim"], scale: Float[Array, "*rows"], dtype: str) -> Shaped[Array, "*rows dim"]:
    """`x / scale`, rounded to the nearest value of `dtype`; int4 in bytes of its own."""
    largest = LARGEST[dtype]
    y = jnp.clip(x.astype(jnp.float32) / scale[..., None], -largest, largest)
    return jnp.round(y).astype(jnp.int8) if dtype.startswith("int") else y.astype(dtype)


def check_dtype(dtype: DTypeLike) -> str:
    """The name of `dtype`, if pages can have it.

    Raises:
        ValueError: they cannot.
    """
    name = jnp.dtype(dtype).name
    if name not in PLAIN_DTYPES and name not in LARGEST:
        raise ValueError(f"dtype={name} must be one of {', '.join([*PLAIN_DTYPES, *LARGEST])}")
    return name


def _pack_nibbles(rows: Shaped[Array, "*rows lanes"]) -> Shaped[Array, "*rows half_lanes"]:
    """Lane `i` in the low nibble of byte `i`, lane `i + lanes / 2` in the high one."""
    half = rows.shape[-1] // 2
    return (rows[..., :half] & 0xF) | (rows[..., half:] << 4)


def _unpack_nibbles(rows: Shaped[Array, "*rows half_lanes"]) -> Shaped[Array, "*rows lanes"]:
    return jnp.concatenate([(rows << 4) >> 4, rows >> 4], axis=-1)
