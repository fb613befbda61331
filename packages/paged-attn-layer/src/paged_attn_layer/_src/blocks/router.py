"""The router of a mixture of experts: which experts compute a token, and how much each counts."""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from paged_attn_layer._src.blocks.norm import Norm, NormConfig

_SMALLEST_SUM = 1e-20


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How experts are chosen for a token with hidden row `x`. Static and hashable.

        s = score(logit_scale norm(x) W + bias)        a score of each expert
        chosen = the experts_per_token experts with the largest s + choice_bias, within the chosen groups
        weight = scale s[chosen]          divided by the sum of s[chosen] if renormalise, and times expert_scale[chosen]

    The experts form `expert_groups` groups of equal size, of which a token takes the best `groups_per_token`. A group
    is as good as its largest `s + choice_bias`, or the sum of its two largest. A softmax over all experts that is
    renormalised is the softmax over the chosen ones.

    Raises:
        ValueError: a number does not fit the others; names it.
    """

    num_experts: int
    experts_per_token: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    """The softmax is over all experts."""
    use_bias: bool = False
    """True if there is a bias of each expert, added before the score."""
    use_choice_bias: bool = False
    """True if there is a bias of each expert that decides which are chosen, and does not change the weights."""
    expert_groups: int = 1
    """How many groups the experts form."""
    groups_per_token: int = 1
    """How many groups have the experts that can be chosen for a token."""
    group_score: Literal["largest", "two_largest"] = "largest"
    """What a group counts: its largest expert, or the sum of its two largest."""
    norm: NormConfig | None = None
    """How rows are normalised before their scores; `None` leaves them as they are."""
    logit_scale: float = 1.0
    use_expert_scale: bool = False
    """True if there is a factor of each expert on its weights."""
    renormalise: bool = False
    """True if the weights of a token are made to sum to `scale`."""
    scale: float = 1.0
    """Factor on the weights."""

    def __post_init__(self) -> None:
        if self.score not in ("softmax", "sigmoid"):
            raise ValueError(f"score={self.score!r} must be 'softmax' or 'sigmoid'")
        if self.group_score not in ("largest", "two_largest"):
            raise ValueError(f"group_score={self.group_score!r} must be 'largest' or 'two_largest'")
        groups = self.expert_groups
        if groups < 1 or self.num_experts % groups:
            raise ValueError(f"expert_groups={groups} must be at least 1 and divide num_experts={self.num_experts}")
        if not 1 <= self.groups_per_token <= groups:
            raise ValueError(f"groups_per_token={self.groups_per_token} must be from 1 to expert_groups={groups}")
        if groups > 1 and self.group_score == "two_largest" and self.num_experts < 2 * groups:
            raise ValueError(f"expert_groups={groups} must have at least two of the {self.num_experts} experts each")
        most = self.num_experts // groups * self.groups_per_token
        if not 1 <= self.experts_per_token <= most:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} must be from 1 to {most}, the experts that can be chosen"
            )


class Choice(NamedTuple):
    """The experts that compute each row."""

    experts: Int32[Array, "rows k"]
    """Which they are; never twice the same for one row."""
    weights: Float[Array, "rows k"]
    """The factor on what each of them gives, in float32."""


class Router(nnx.Module):
    """Chooses experts for rows, as `RouterConfig` writes it, in float32.

    Its weights are `kernel [hidden, experts]`, and where there are any `bias`, `choice_bias` and `expert_scale`, all
    `[experts]`, and those of the `norm`.
    """

    def __init__(
        self, hidden_size: int, config: RouterConfig, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ) -> None:
        """A router with random weights, and biases of 0.

        Args:
            hidden_size: size of a row.
            config: how experts are chosen.
            param_dtype: type of the weights; `choice_bias` is float32 always, for its small differences decide.
            rngs: source of the weights.
        """
        self.config = config
        shape = (hidden_size, config.num_experts)
        self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs(), shape, param_dtype))
        if config.use_bias:
            self.bias = nnx.Param(jnp.zeros(config.num_experts, param_dtype))
        self.norm = None if config.norm is None else Norm(hidden_size, config.norm, param_dtype=param_dtype)
        if config.use_expert_scale:
            self.expert_scale = nnx.Param(jnp.ones(config.num_experts, param_dtype))
        if config.use_choice_bias:
            self.choice_bias = nnx.Param(jnp.zeros(config.num_experts, jnp.float32))

    def __call__(self, x: Float[Array, "rows hidden"]) -> Choice:
        """The experts of each row."""
        config, scores = self.config, self._scores(x)
        biased = scores + self.choice_bias[...][None] if config.use_choice_bias else scores
        _, experts = jax.lax.top_k(_within_groups(biased, config), config.experts_per_token)
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if config.renormalise:
            weights = weights / (weights.sum(-1, keepdims=True) + _SMALLEST_SUM)
        if config.use_expert_scale:
            weights = weights * self.expert_scale[...].astype(jnp.float32)[experts]
        return Choice(experts, weights * config.scale)

    def _scores(self, x: Array) -> Float[Array, "rows experts"]:
        # A TPU would multiply in bfloat16 without `precision`, and choose other experts.
        kernel, rows = self.kernel[...].astype(jnp.float32), x if self.norm is None else self.norm(x)
        logits = jnp.dot(rows.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)
        logits = logits * self.config.logit_scale
        if self.config.use_bias:
            logits = logits + self.bias[...].astype(jnp.float32)[None]
        return jax.nn.sigmoid(logits) if self.config.score == "sigmoid" else jax.nn.softmax(logits, axis=-1)


def _within_groups(scores: Float[Array, "rows experts"], config: RouterConfig) -> Float[Array, "rows experts"]:
    """The scores, -inf for experts of groups that are not chosen."""
    if config.expert_groups == config.groups_per_token:
        return scores
    grouped = scores.reshape(-1, config.expert_groups, config.num_experts // config.expert_groups)
    largest, _ = jax.lax.top_k(grouped, 1 if config.group_score == "largest" else 2)
    _, chosen = jax.lax.top_k(largest.sum(-1), config.groups_per_token)
    is_chosen = jax.nn.one_hot(chosen, config.expert_groups, dtype=bool).any(axis=1)
    return jnp.where(is_chosen[..., None], grouped, -jnp.inf).reshape(scores.shape)
