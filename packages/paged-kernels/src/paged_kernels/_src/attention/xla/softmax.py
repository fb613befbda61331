"""The online softmax: keys arrive in blocks."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftmaxState:
    """The softmax of each row over its keys so far, all float32 (Milakov and Gimelshein, arXiv 1805.02867).

    With `s` the logits so far: `top = max s`, `total = sum exp(s - top)`, `values = sum exp(s - top) v`.
    """

    top: Float[Array, "kv_heads rows"]
    """The largest logit; -inf before the first key."""
    total: Float[Array, "kv_heads rows"]
    """The sum of the weights."""
    values: Float[Array, "kv_heads rows v_head_dim"]
    """The weighted sum of the values."""

    @classmethod
    def initial(cls, sinks: Float[Array, "kv_heads rows"], v_head_dim: int) -> "SoftmaxState":
        """The state before any key. A sink is a logit without a value; -inf means no sink."""
        total = jnp.where(jnp.isneginf(sinks), 0, jnp.ones_like(sinks))
        return cls(top=sinks, total=total, values=jnp.zeros((*sinks.shape, v_head_dim), jnp.float32))

    def add_keys(
        self, s: Float[Array, "kv_heads rows keys"], v: Float[Array, "kv_heads keys v_head_dim"]
    ) -> "SoftmaxState":
        """Returns the state after some more keys. A logit of -inf hides its key, whose value must still be finite."""
        top = jnp.maximum(self.top, s.max(axis=-1))
        shift = jnp.where(jnp.isneginf(top), 0, top)  # -inf - -inf would be NaN
        weights = jnp.exp(s - shift[..., None])
        decay = jnp.exp(self.top - shift)
        return SoftmaxState(
            top=top,
            total=decay * self.total + weights.sum(axis=-1),
            values=decay[..., None] * self.values + jnp.einsum("hrp,hpd->hrd", weights, v, precision="highest"),
        )

    def output(self) -> Float[Array, "kv_heads rows v_head_dim"]:
        """Returns each row's output; 0 for a row that saw no key."""
        return self.values / self._divisor()[..., None]

    def lse(self) -> Float[Array, "kv_heads rows"]:
        """Returns each row's log-sum-exp; -inf for a row that saw no key."""
        return self.top + jnp.log(self._divisor())

    def _divisor(self) -> Float[Array, "kv_heads rows"]:
        return jnp.where(self.total > 0, self.total, 1)


def logits(
    q: Float[Array, "kv_heads rows head_dim"], k: Float[Array, "kv_heads keys head_dim"], soft_cap: float | None
) -> Float[Array, "kv_heads rows keys"]:
    """Returns `cap(q . k)` for each row and key. The softmax scale is already part of `q`."""
    s = jnp.einsum("hrd,hpd->hrp", q, k, precision="highest")
    return s if soft_cap is None else soft_cap * jnp.tanh(s / soft_cap)
