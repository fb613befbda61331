"""What attention to compute: the static facts for which a kernel is compiled."""

import dataclasses
import numbers

import jax
import numpy as np

FLOAT32 = np.finfo(np.float32)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """The attention to compute. It is hashable, so it can be a static argument of `jax.jit`.

    For a query at position `t` and a key at position `p` of the same sequence, the logit is

        s(t, p) = cap(softmax_scale * q_t . k_p)      cap(x) = soft_cap * tanh(x / soft_cap), or x without a cap

    The key is visible if `p <= t` (with `causal`) and `t - p < sliding_window` (with a window). The output is `sum_p
    softmax_p(s(t, p)) v_p` over the visible keys, and zero if no key is visible.

    Raises:
        ValueError: a field has a meaningless value, such as a window of zero keys.
    """

    softmax_scale: float | None = None
    """The factor on `q . k`; `None` means `head_dim ** -0.5`."""
    causal: bool = True
    """True if a query sees only the keys up to its own position."""
    sliding_window: int | None = None
    """The number of keys that a query sees, counted back from its own position, its own key included; `None` means
    all."""
    soft_cap: float | None = None
    """The bound on the logits' magnitude (Gemma 2, arXiv 2408.00118); `None` means no bound."""

    def __post_init__(self) -> None:
        _check_positive("softmax_scale", self.softmax_scale)
        _check_positive("soft_cap", self.soft_cap)
        if not isinstance(self.causal, bool):
            raise ValueError(f"causal={self.causal!r} must be True or False")
        window = self.sliding_window
        if window is None:
            return
        if not isinstance(window, numbers.Integral) or isinstance(window, bool) or not 1 <= window < 2**31:
            raise ValueError(
                f"sliding_window={window!r} must be an int of at least 1 (the query's own key) and below 2**31 "
                "(positions are int32), or None for no window"
            )

    def resolved_scale(self, head_dim: int) -> float:
        """Returns the factor on `q . k` for this head size."""
        return head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale


def _check_positive(name: str, value: float | None) -> None:
    if value is None:
        return
    least, most = float(FLOAT32.smallest_normal), float(FLOAT32.max)  # kernels compute in float32
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not (least <= value <= most):
        raise ValueError(
            f"{name}={value!r} must be a positive finite Python number, or None for the default; in float32, in which "
            f"logits are computed, {least:.4g} is the smallest and {most:.4g} the largest"
        )
