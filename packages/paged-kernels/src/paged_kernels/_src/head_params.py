"""Parameters of each query head that change its logits."""

import dataclasses

import jax
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadParams:
    """A layer's parameters of its query heads, `[q_heads]` each. `None` has no effect and no cost.

    With both, the logit of a query at position `t` and a key at position `p` is `cap(softmax_scale q . k) - slope |t -
    p|`. The softmax of a row divides by `exp(sink) + sum_p exp(s(t, p))`.
    """

    sinks: Float[Array, " q_heads"] | None = None
    """An extra logit in each row's softmax, without a value (gpt-oss; StreamingLLM, arXiv 2309.17453)."""
    alibi_slopes: Float[Array, " q_heads"] | None = None
    """What is subtracted from a logit per position between query and key (ALiBi, arXiv 2108.12409)."""
