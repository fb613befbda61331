"""Rotary position embedding as Llama checkpoints have it (arXiv 2104.09864, with the two halves of a head paired)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

ROPE_TYPES = ("default", "linear", "llama3")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """How far a position turns each pair of a head's elements; the names are those of a Hugging Face config.

    Pair `i` of `head_dim / 2` turns by `position * w_i`, where `w_i = theta ** (-2 i / head_dim)`, and

        default   w_i
        linear    w_i / factor
        llama3    w_i / factor  where its wavelength 2 pi / w_i is above original_max_position / low_freq_factor,
                  w_i           where it is below original_max_position / high_freq_factor, and between them
                  (1 - m) w_i / factor + m w_i, m rising from 0 to 1 linearly in original_max_position / wavelength

    With `freq_factors`, `w_i` is divided by `freq_factors[i]` first.

    Raises:
        ValueError: a number is not positive, or the two llama3 factors are not in order.
        NotImplementedError: `rope_type` is none of the three.
    """

    theta: float = 10000.0
    """Base of the frequencies."""
    rope_type: str = "default"
    """`default`, `linear` or `llama3`."""
    factor: float = 1.0
    """How many times longer than trained for the sequences get (linear, llama3)."""
    low_freq_factor: float = 1.0
    """Turns within the original length up to which a pair is slowed wholly (llama3)."""
    high_freq_factor: float = 4.0
    """Turns within the original length from which a pair is not slowed at all (llama3)."""
    original_max_position: int = 8192
    """Sequence length that the model was first trained for (llama3)."""
    freq_factors: tuple[float, ...] = ()
    """A divisor of each pair's frequency, as GGUF files have it in `rope_freqs.weight`; empty for none."""

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise NotImplementedError(f"rope_type={self.rope_type!r} is not supported; {', '.join(ROPE_TYPES)} are")
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position"):
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

    def check_pairs(self, head_dim: int) -> None:
        """Refuse `freq_factors` that do not fit heads of this size.

        Raises:
            ValueError: there is not one for each pair.
        """
        if len(self.freq_factors) not in (0, head_dim // 2):
            raise ValueError(
                f"freq_factors has {len(self.freq_factors)} entries; it must have {head_dim // 2}, one for each pair "
                f"of head_dim={head_dim}"
            )


def rope_frequencies(head_dim: int, config: RopeConfig) -> np.ndarray:
    """How far one position turns each pair, in radians: float32 `[head_dim / 2]`.

    >>> rope_frequencies(4, RopeConfig(theta=100.0)).tolist()
    [1.0, 0.10000000149011612]

    Raises:
        ValueError: `head_dim` is odd, or `freq_factors` has not one entry for each pair.
    """
    if head_dim % 2:
        raise ValueError(f"head_dim={head_dim} must be even: rotary embedding turns pairs of elements")
    w = config.theta ** (-np.arange(0, head_dim, 2) / head_dim)
    config.check_pairs(head_dim)
    if config.freq_factors:
        w = w / np.array(config.freq_factors)
    if config.rope_type == "linear":
        w = w / config.factor
    elif config.rope_type == "llama3":
        w = _llama3(w, config)
    return w.astype(np.float32)


def apply_rope(
    x: Float[Array, "*rows heads head_dim"], positions: Int32[Array, "*rows"], config: RopeConfig
) -> Float[Array, "*rows heads head_dim"]:
    """`x` with each head turned by its position, computed in float32 and returned in `x.dtype`.

    With `a, b` the two halves of a head and `r = position * w`, the halves become `a cos r - b sin r` and
    `b cos r + a sin r`.
    """
    angle = positions[..., None, None].astype(jnp.float32) * rope_frequencies(x.shape[-1], config)
    cos, sin = jnp.cos(angle), jnp.sin(angle)  # [*rows, 1, head_dim / 2]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _llama3(w: np.ndarray, config: RopeConfig) -> np.ndarray:
    turns = config.original_max_position * w / (2 * np.pi)  # within the original length
    low, high = config.low_freq_factor, config.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - keep) * w / config.factor + keep * w
