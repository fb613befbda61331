"""Attention over parts of the keys, put together."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def merge_attention_states(
    outputs: Float[Array, "parts tokens q_heads dim"], lses: Float[Array, "parts tokens q_heads"]
) -> tuple[Float[Array, "tokens q_heads dim"], Float[Array, "tokens q_heads"]]:
    """The attention over all keys, from that over disjoint parts of them: output in their dtype, and log-sum-exp.

        lse = log sum_i exp(lse_i)        out = sum_i exp(lse_i - lse) out_i

    A part with no visible key has `lse_i = -inf` and weighs nothing; rows with none at all give zeros and -inf. Give a
    sink to one part only, one that has keys of every sequence. For cascade attention (one shared prefix, many suffixes;
    FlashInfer, arXiv 2501.01005) and for contexts that are split over devices.

    >>> out, lse = merge_attention_states(jnp.array([[[[1.0]]], [[[3.0]]]]), jnp.zeros((2, 1, 1)))
    >>> out.tolist(), round(float(lse[0, 0]), 3)
    ([[[2.0]]], 0.693)

    Raises:
        ValueError: the shapes do not belong together.
    """
    if outputs.ndim != 4 or outputs.shape[:3] != lses.shape:
        raise ValueError(
            f"outputs {outputs.shape} and lses {lses.shape} must be [parts, tokens, q_heads, dim] and without dim"
        )
    lse = jax.nn.logsumexp(lses, axis=0)
    weights = jnp.exp(lses - jnp.where(jnp.isneginf(lse), 0, lse))
    out = jnp.sum(weights[..., None] * outputs.astype(weights.dtype), axis=0)
    return out.astype(outputs.dtype), lse
