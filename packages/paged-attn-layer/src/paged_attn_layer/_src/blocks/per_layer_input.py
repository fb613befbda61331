"""Per-layer inputs (Gemma 3n and 4): besides the hidden rows, each layer gets a small row of its own for each token."""

import dataclasses
import functools
import math

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from paged_attn_layer._src.blocks.embedding import embedding_rows
from paged_attn_layer._src.blocks.mlp import ACTIVATIONS, check_activation
from paged_attn_layer._src.blocks.norm import Norm, NormConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerLayerInputConfig:
    """How a layer uses its inputs. Static and hashable.

    Raises:
        ValueError: a size is below 1.
        NotImplementedError: the activation is not supported.
    """

    hidden_size: int
    size: int
    """Numbers of a layer's input for one token."""
    norm: NormConfig
    """Normalises the inputs where they are made, and what is added where they are used."""
    activation: str = "gelu_pytorch_tanh"

    def __post_init__(self) -> None:
        for name in ("hidden_size", "size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        check_activation(self.activation)


class PerLayerInputs(nnx.Module):
    """Makes the inputs of all layers from tokens and their embeddings.

    inputs = (norm(x W / sqrt(hidden_size)) + sqrt(size) embed[token_ids]) / sqrt(2)        cut into layers
    """

    def __init__(
        self,
        config: PerLayerInputConfig,
        num_layers: int,
        vocab_size: int,
        *,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        wide = num_layers * config.size
        self.embed = nnx.Embed(vocab_size, wide, param_dtype=param_dtype, rngs=rngs)
        self.proj = nnx.Linear(config.hidden_size, wide, use_bias=False, param_dtype=param_dtype, rngs=rngs)
        self.norm = Norm(config.size, config.norm, param_dtype=param_dtype)

    def __call__(
        self, token_ids: Int32[Array, "*rows"], embedded: Float[Array, "*rows hidden"]
    ) -> Float[Array, "*rows layers size"]:
        """The input of each layer for each token."""
        projected = self.proj(embedded) * self.config.hidden_size**-0.5
        by_layer = self.norm(projected.reshape(*token_ids.shape, -1, self.config.size))
        of_tokens = embedding_rows(self.embed, token_ids).reshape(by_layer.shape) * math.sqrt(self.config.size)
        return (by_layer + of_tokens) * 2**-0.5


class PerLayerInput(nnx.Module):
    """Adds one layer's inputs `p` to hidden rows: `x + norm((act(x W_gate) * p) W_out)`."""

    def __init__(self, config: PerLayerInputConfig, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        linear = functools.partial(nnx.Linear, use_bias=False, param_dtype=param_dtype, rngs=rngs)
        self.gate_proj = linear(config.hidden_size, config.size)
        self.out_proj = linear(config.size, config.hidden_size)
        self.norm = Norm(config.hidden_size, config.norm, param_dtype=param_dtype)

    def __call__(
        self, hidden: Float[Array, "*rows hidden"], inputs: Float[Array, "*rows size"]
    ) -> Float[Array, "*rows hidden"]:
        """The rows after it."""
        gate = ACTIVATIONS[self.config.activation](self.gate_proj(hidden))
        return hidden + self.norm(self.out_proj(gate * inputs))
