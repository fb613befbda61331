"""Feed-forward blocks."""

import functools

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class GatedMLP(nnx.Module):
    """`down(silu(gate(x)) * up(x))`, the three projections `nnx.Linear`."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        use_bias: bool = False,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        linear = functools.partial(nnx.Linear, use_bias=use_bias, param_dtype=param_dtype, rngs=rngs)
        self.gate_proj = linear(hidden_size, intermediate_size)
        self.up_proj = linear(hidden_size, intermediate_size)
        self.down_proj = linear(intermediate_size, hidden_size)

    def __call__(self, x: Float[Array, "*rows hidden"]) -> Float[Array, "*rows hidden"]:
        """The block's output for each row."""
        return self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x))
