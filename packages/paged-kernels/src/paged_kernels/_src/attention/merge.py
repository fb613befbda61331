"""Merges attention over parts of the keys."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def merge_attention_states(
    outputs: Float[Array, "parts tokens q_heads dim"], lses: Float[Array, "parts tokens q_heads"]
) -> tuple[Float[Array, "tokens q_heads dim"], Float[Array, "tokens q_heads"]]:
    """Returns the attention over all keys, from the attention over disjoint parts of them.

        lse = log sum_i exp(lse_i)        out = sum_i exp(lse_i - lse) out_i

    The result is the output in the dtype of `outputs`, and the log-sum-exp. A part with no visible key has `lse_i =
    -inf` and weight 0. Rows with no visible key in any part give 0 and -inf. Give a sink to one part only, and to one
    that has keys of every sequence. Used for cascade attention (one shared prefix, many suffixes; FlashInfer, arXiv
    2501.01005) and for contexts that are split over devices.

    >>> out, lse = merge_attention_states(jnp.array([[[[1.0]]], [[[3.0]]]]), jnp.zeros((2, 1, 1)))
    >>> out.tolist(), round(float(lse[0, 0]), 3)
    ([[[2.0]]], 0.693)

    Raises:
        ValueError: the shapes do not match.
    """
    if outputs.ndim != 4 or outputs.shape[:3] != lses.shape:
        raise ValueError(
            f"outputs {outputs.shape} must be [parts, tokens, q_heads, dim], and lses {lses.shape} the same without dim"
        )
    lse = jax.nn.logsumexp(lses, axis=0)
    weights = jnp.exp(lses - jnp.where(jnp.isneginf(lse), 0, lse)[None])
    out = jnp.sum(weights[..., None] * outputs.astype(weights.dtype), axis=0)
    return out.astype(outputs.dtype), lse
