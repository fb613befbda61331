"""Rotary position embedding (arXiv 2104.09864) as checkpoints of Hugging Face have it."""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

_POSITIVE = (
    *("theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position"),
    *("beta_fast", "beta_slow", "attention_factor"),
)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """How far a position turns each pair of a head's elements; the names are those of a Hugging Face config.

    Pair `i` of the first `rotary_dim` elements turns by `position * w`. If `w_i = theta ** (-2 i / rotary_dim)`, `w` is

        default        w_i
        linear         w_i / factor
        llama3         w_i / factor  where its wavelength 2 pi / w_i is above original_max_position / low_freq_factor,
                       w_i           where it is below original_max_position / high_freq_factor, and between them
                       (1 - m) w_i / factor + m w_i, m rising from 0 to 1 linearly in original_max_position / wavelength
        yarn           m w_i / factor + (1 - m) w_i, m rising from 0 to 1 linearly in i, from the pair that turns
                       beta_fast times within original_max_position to the one that turns beta_slow times
        proportional   w_i / factor, with w_i = theta ** (-2 i / head_dim): the pairs are those of the whole head, and
                       only the first rotary_dim / 2 of them turn

    With `freq_factors`, `w_i` is divided by `freq_factors[i]` first. The turned elements are multiplied by
    `attention_factor`; those beyond `rotary_dim` are left as they are.

    Hugging Face's `dynamic` and `longrope` depend on a sequence's length. `paged_attn_layer.read_config` makes of them
    a `theta` and `freq_factors` for the longest sequence to be served.

    Raises:
        ValueError: a number is not positive, the two llama3 factors are not in order, `rotary_dim` is odd, yarn's
            `theta` is not above 1, or angles are not finite in float32.
        NotImplementedError: `rope_type` is none of these.
    """

    theta: float = 10000.0
    """Base of the frequencies."""
    rope_type: str = "default"
    """`default`, `linear`, `llama3`, `yarn` or `proportional`."""
    factor: float = 1.0
    """How many times longer than trained for the sequences get (all but default)."""
    low_freq_factor: float = 1.0
    """Turns within the original length up to which a pair is slowed wholly (llama3)."""
    high_freq_factor: float = 4.0
    """Turns within the original length from which a pair is not slowed at all (llama3)."""
    beta_fast: float = 32.0
    """Turns within the original length from which a pair is not slowed at all (yarn)."""
    beta_slow: float = 1.0
    """Turns within the original length up to which a pair is slowed wholly (yarn)."""
    truncate: bool = True
    """True if these two pairs are rounded to whole ones (yarn)."""
    original_max_position: int = 8192
    """Sequence length that the model was first trained for (llama3, yarn)."""
    freq_factors: tuple[float, ...] = ()
    """A divisor of each pair's frequency (longrope, and `rope_freqs.weight` of GGUF files); empty for none."""
    attention_factor: float = 1.0
    """Factor on the turned elements of queries and keys (yarn, longrope)."""
    rotary_dim: int | None = None
    """How many elements of a head turn, from the first on; `None` for all."""
    interleaved: bool = False
    """True if the elements `2 i` and `2 i + 1` are a pair, False if `i` and `i + rotary_dim / 2` are."""

    def __post_init__(self) -> None:
        if self.rope_type not in _SCALINGS:
            raise NotImplementedError(f"rope_type={self.rope_type!r} is not supported; {', '.join(_SCALINGS)} are")
        for name in _POSITIVE:
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be positive and finite")
        for index, value in enumerate(self.freq_factors):
            if not 0 < value < math.inf:
                raise ValueError(f"freq_factors[{index}]={value} must be positive and finite")
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} must be below high_freq_factor={self.high_freq_factor}"
            )
        if self.rope_type == "yarn" and self.theta <= 1:
            raise ValueError(f"theta={self.theta} must be above 1 for rope_type='yarn'")
        self._check_angles()
        if self.rotary_dim is not None and (self.rotary_dim < 2 or self.rotary_dim % 2):
            raise ValueError(f"rotary_dim={self.rotary_dim} must be even and at least 2: pairs of elements turn")

    def _check_angles(self) -> None:
        """Refuse numbers with which an angle is not finite in float32: every logit would be NaN."""
        fastest, divisor = max(1.0, 1 / self.theta), min(1.0, self.factor, *self.freq_factors) ** 2  # both may divide
        most = float(np.finfo(np.float32).max)
        if fastest * 2**31 > most * divisor or self.attention_factor > most:
            raise ValueError(
                f"theta={self.theta}, factor={self.factor}, attention_factor={self.attention_factor} and freq_factors "
                f"from {min(self.freq_factors, default=1.0)} must give angles that are finite in float32"
            )

    def check_head(self, head_dim: int) -> None:
        """Refuse heads of a size that this does not fit.

        Raises:
            ValueError: `head_dim` is odd or below `rotary_dim`, or there is not one of `freq_factors` for each pair.
        """
        if head_dim % 2:
            raise ValueError(f"head_dim={head_dim} must be even: rotary embedding turns pairs of elements")
        dim = self.rotary_dim or head_dim
        if dim > head_dim:
            raise ValueError(f"rotary_dim={dim} must be at most head_dim={head_dim}")
        if len(self.freq_factors) not in (0, dim // 2):
            raise ValueError(
                f"freq_factors has {len(self.freq_factors)} entries; it must have {dim // 2}, one for each pair of "
                f"{dim} elements"
            )


def rope_frequencies(head_dim: int, config: RopeConfig) -> np.ndarray:
    """How far one position turns each pair, in radians: float32 `[pairs]`.

    >>> rope_frequencies(4, RopeConfig(theta=100.0)).tolist()
    [1.0, 0.10000000149011612]

    Raises:
        ValueError: the heads are of a size that the config does not fit.
    """
    config.check_head(head_dim)
    dim = config.rotary_dim or head_dim
    whole = head_dim if config.rope_type == "proportional" else dim
    w = config.theta ** (-np.arange(0, dim, 2) / whole)
    if config.freq_factors:
        w = w / np.array(config.freq_factors)
    w = np.pad(_SCALINGS[config.rope_type](w, config), (0, (whole - dim) // 2))
    return w.astype(np.float32)


def apply_rope(
    x: Float[Array, "*rows heads head_dim"], positions: Int32[Array, "*rows"], config: RopeConfig
) -> Float[Array, "*rows heads head_dim"]:
    """`x` with each head turned by its position, computed in float32 and returned in `x.dtype`.

    A pair `a, b` that turns by `r = position * w` becomes `a cos r - b sin r` and `b cos r + a sin r`.
    """
    w = rope_frequencies(x.shape[-1], config)
    angle = positions[..., None, None].astype(jnp.float32) * w.reshape((1,) * (x.ndim - 1) + w.shape)
    cos, sin = jnp.cos(angle) * config.attention_factor, jnp.sin(angle) * config.attention_factor  # [*rows, 1, pairs]
    turning, still = x[..., : 2 * len(w)].astype(jnp.float32), x[..., 2 * len(w) :]
    a, b = _pairs(turning, config)
    turned = _joined(a * cos - b * sin, b * cos + a * sin, config)
    return jnp.concatenate([turned.astype(x.dtype), still], axis=-1)


def _pairs(x: Array, config: RopeConfig) -> tuple[Array, Array]:
    """The first and the second element of each pair."""
    if config.interleaved:
        return x[..., ::2], x[..., 1::2]
    a, b = jnp.split(x, 2, axis=-1)
    return a, b


def _joined(a: Array, b: Array, config: RopeConfig) -> Array:
    """The inverse of `_pairs`."""
    if config.interleaved:
        return jnp.stack([a, b], axis=-1).reshape(*a.shape[:-1], -1)
    return jnp.concatenate([a, b], axis=-1)


def _unscaled(w: np.ndarray, _config: RopeConfig) -> np.ndarray:
    return w


def _linear(w: np.ndarray, config: RopeConfig) -> np.ndarray:
    return w / config.factor


def _llama3(w: np.ndarray, config: RopeConfig) -> np.ndarray:
    turns = config.original_max_position * w / (2 * np.pi)  # within the original length
    low, high = config.low_freq_factor, config.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - keep) * w / config.factor + keep * w


def _yarn(w: np.ndarray, config: RopeConfig) -> np.ndarray:
    """ArXiv 2309.00071, section 3.2, with the ramp over pairs that its published code has."""
    first, last = (_pair_that_turns(times, len(w), config) for times in (config.beta_fast, config.beta_slow))
    if config.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * len(w) - 1)
    slowed = np.clip((np.arange(len(w)) - first) / (last - first or 0.001), 0, 1)
    return slowed * w / config.factor + (1 - slowed) * w


def _pair_that_turns(times: float, pairs: int, config: RopeConfig) -> float:
    """The pair, as a fraction, that turns so many times within the original length without scaling."""
    return pairs * math.log(config.original_max_position / (times * 2 * math.pi)) / math.log(config.theta)


_SCALINGS: Mapping[str, Callable[[np.ndarray, RopeConfig], np.ndarray]] = {
    "default": _unscaled,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "proportional": _linear,
}
"""What each type of rotary embedding makes of the plain frequencies."""
