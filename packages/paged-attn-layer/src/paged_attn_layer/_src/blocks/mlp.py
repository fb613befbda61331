"""Feed-forward blocks."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

_gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": jax.nn.relu,
}
"""The activations by Hugging Face's names."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClampedGLU:
    """The activation of gpt-oss, of a gate `g` and `u`: `g sigmoid(alpha g) (u + 1)`.

    Before, `g` is bounded by `limit` from above, and `u` on both sides.
    """

    alpha: float
    limit: float

    def __call__(self, gate: Array, up: Array) -> Array:
        """The activation, element by element."""
        gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        return gate * jax.nn.sigmoid(self.alpha * gate) * (up + 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """Sizes of a feed-forward block, and what is computed in it. Static and hashable.

    Raises:
        ValueError: a size is below 1, or the activation needs a gate that there is not.
        NotImplementedError: the activation is not one of `ACTIVATIONS`.
    """

    hidden_size: int
    intermediate_size: int
    activation: str | ClampedGLU = "silu"
    """One of `ACTIVATIONS`, or a `ClampedGLU`, which takes the place of `act(gate(x)) * up(x)`."""
    gated: bool = True
    """True for `down(act(gate(x)) * up(x))`, False for `down(act(up(x)))`."""
    use_bias: bool = False
    """True if the projections add a bias."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if isinstance(self.activation, str):
            check_activation(self.activation)
        elif not self.gated:
            raise ValueError(f"activation={self.activation} needs gated=True")

    def activate(self, up: Array, gate: Array | None) -> Array:
        """The elements that the last projection gets, from those of `up` and of `gate` (`None` if not gated)."""
        if isinstance(self.activation, ClampedGLU):
            return self.activation(gate, up)  # pyright: ignore[reportArgumentType] - there is a gate: checked above
        act = ACTIVATIONS[self.activation]
        return act(up) if gate is None else act(gate) * up


class MLP(nnx.Module):
    """A feed-forward block as `MLPConfig` writes it; `gate_proj` (if gated), `up_proj` and `down_proj` are linear."""

    def __init__(self, config: MLPConfig, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        linear = functools.partial(nnx.Linear, use_bias=config.use_bias, param_dtype=param_dtype, rngs=rngs)
        if config.gated:
            self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: Float[Array, "*rows hidden"]) -> Float[Array, "*rows hidden"]:
        """The block's output for each row."""
        gate = self.gate_proj(x) if self.config.gated else None
        return self.down_proj(self.config.activate(self.up_proj(x), gate))


def check_activation(name: str) -> None:
    """Refuse an activation that is not in `ACTIVATIONS`.

    Raises:
        NotImplementedError: names it, and those that are.
    """
    if name not in ACTIVATIONS:
        raise NotImplementedError(f"activation {name!r} is not supported; {', '.join(ACTIVATIONS)} are")
