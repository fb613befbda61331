"""The rows of an embedding, in the type of its weights."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32


def embedding_rows(embed: nnx.Embed, ids: Int32[Array, "*rows"]) -> Float[Array, "*rows size"]:
    """The row of each id, in the type that the weights have now.

    `nnx.Embed` itself gives the type that they had when it was made; in a model cast to bfloat16 that is float32.
    """
    return jnp.take(embed.embedding[...], ids, axis=0)
