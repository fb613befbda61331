"""What each query head brings to the logits besides its queries: parameters of a layer."""

import dataclasses

import jax
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadParams:
    """Parameters of the query heads, `[q_heads]` each; a field that is `None` has no effect and costs nothing.

    With both, the logit of a query at position `t` and a key at position `p` is `cap(scale q . k) - slope |t - p|`, and
    the softmax of a row divides by `exp(sink) + sum_p exp(s(t, p))`.
    """

    sinks: Float[Array, " q_heads"] | None = None
    """A logit in each row's softmax that has no value (gpt-oss; StreamingLLM, arXiv 2309.17453)."""
    alibi_slopes: Float[Array, " q_heads"] | None = None
    """What a logit loses for each position between query and key (ALiBi, arXiv 2108.12409)."""
