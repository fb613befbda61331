"""Normalisation of hidden rows and of heads, computed in float32."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

_LEAST, _MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormConfig:
    """How the last axis `x` of an array is normalised. Static and hashable.

        rms      x / sqrt(mean(x ** 2) + eps)                        times (scale + offset), plus bias
        layer    (x - mean(x)) / sqrt(variance(x) + eps)             times (scale + offset), plus bias

    Raises:
        ValueError: `kind` is neither, or `eps` is not above 0 and finite in float32.
    """

    kind: Literal["rms", "layer"] = "rms"
    """`rms` (arXiv 1910.07467) or `layer` (arXiv 1607.06450)."""
    eps: float = 1e-6
    """Added to the mean square or the variance."""
    use_scale: bool = True
    """True if there is a weight for each number of the axis."""
    offset: float = 0.0
    """Added to the weights; 1 in Gemma's checkpoints, whose weights are stored around 0."""
    use_bias: bool = False
    """True if a bias is added."""

    def __post_init__(self) -> None:
        if self.kind not in ("rms", "layer"):
            raise ValueError(f"kind={self.kind!r} must be 'rms' or 'layer'")
        if not _LEAST <= self.eps <= _MOST:  # it is added in float32
            raise ValueError(f"eps={self.eps} must be above 0 and finite, in float32")


class Norm(nnx.Module):
    """The last axis of an array normalised as `NormConfig` writes it; `scale` and `bias` are its weights."""

    def __init__(
        self, size: int | tuple[int, ...], config: NormConfig, *, param_dtype: DTypeLike = jnp.float32
    ) -> None:
        """A norm with a factor of 1 and a bias of 0.

        Args:
            size: of the axis; or of the last axes, where each row of the last one has weights of its own.
            config: what is computed.
            param_dtype: type of the weights.
        """
        self.config = config
        if config.use_scale:
            self.scale = nnx.Param(jnp.full(size, 1 - config.offset, param_dtype))
        if config.use_bias:
            self.bias = nnx.Param(jnp.zeros(size, param_dtype))

    def __call__(self, x: Float[Array, "*rows size"]) -> Float[Array, "*rows size"]:
        """The normalised rows, in the type of `x`."""
        config, out = self.config, x.astype(jnp.float32)
        if config.kind == "layer":
            out = out - out.mean(-1, keepdims=True)
        out = out * jax.lax.rsqrt(jnp.square(out).mean(-1, keepdims=True) + config.eps)
        if config.use_scale:
            out = out * (_as_row(self.scale, x.ndim) + config.offset)
        if config.use_bias:
            out = out + _as_row(self.bias, x.ndim)
        return out.astype(x.dtype)


def normed(x: Float[Array, "*rows size"], norm: Norm | None) -> Float[Array, "*rows size"]:
    """The rows, normalised if there is a norm."""
    return x if norm is None else norm(x)


def _as_row(weight: nnx.Param, ndim: int) -> Array:
    """The weight in float32, with as many axes as the rows."""
    return weight[...].astype(jnp.float32).reshape((1,) * (ndim - weight.ndim) + weight.shape)
