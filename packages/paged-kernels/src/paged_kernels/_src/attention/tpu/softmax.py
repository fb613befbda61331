"""One step of the online softmax, on arrays: the kernel's arithmetic, without memory or loops.

The logits `s = cap(scale q . k)` are taken to base 2, `x = s log2(e)`. Over the keys so far, a row keeps

    m = max x        l = sum 2^(x - m)        acc = sum 2^(x - m) v

Then the output is `acc / l` and the log-sum-exp is `(m + log2 l) ln 2`. The hardware computes powers of 2, and the
factor `log2(e)` becomes part of the scale.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from paged_kernels._src.tpu.registers import LANES

LOG2_E = math.log2(math.e)
MASKED = -1e30
"""The logit of a key that is not visible. It is finite, so a row without a visible key stays finite. The first visible
key then removes what such a row has summed: it is multiplied by `2^(MASKED - m) = 0`."""


class State(NamedTuple):
    """What a row keeps between blocks of keys. Values cross lanes only to find the maximum of a block."""

    m: Float[Array, "rows 128"]
    """The largest logit so far, repeated along lanes."""
    l: Float[Array, "rows 128"]  # noqa: E741 -- the papers' name
    """One partial sum per lane; `l` is their total."""
    acc: Float[Array, "rows lanes"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logits:
    """Turns a product `q . k` into a logit to base 2."""

    scale: float
    soft_cap: float | None

    def __call__(self, qk: Float[Array, "rows keys"]) -> Float[Array, "rows keys"]:
        """Returns the logits to base 2."""
        if self.soft_cap is None:
            return qk * (self.scale * LOG2_E)
        return jnp.tanh(qk * (self.scale / self.soft_cap)) * (self.soft_cap * LOG2_E)


def score(q: Float[Array, "rows k_lanes"], k: Float[Array, "keys k_lanes"]) -> Float[Array, "rows keys"]:
    """Returns the products `q . k` in float32. Float32 operands are multiplied in full precision."""
    return jax.lax.dot_general(q, k, (((1,), (1,)), ((), ())), _precision(q), jnp.float32)


def add_keys(
    state: State,
    x: Float[Array, "rows keys"],
    v: Float[Array, "keys lanes"],
    v_scales: Float[Array, "1 keys"] | None = None,
) -> State:
    """Returns the state after some more keys.

    Args:
        state: the state before them.
        x: their logits to base 2, `MASKED` where a key is not visible.
        v: their values, all finite.
        v_scales: the scales of quantised values.
    """
    m = jnp.maximum(state.m, jnp.max(x, axis=1, keepdims=True))
    p = jnp.exp2(x - _widen(m, x.shape[1]))
    shrink = jnp.exp2(state.m - m)
    weights = (p if v_scales is None else p * v_scales).astype(v.dtype)
    pv = jax.lax.dot_general(weights, v, (((1,), (0,)), ((), ())), _precision(v), jnp.float32)
    return State(m, state.l * shrink + _sum_by_lane(p), state.acc * _widen(shrink, v.shape[1]) + pv)


def _widen(x: Float[Array, "rows 128"], columns: int) -> Float[Array, "rows columns"]:
    """Repeats a value along `columns` lanes instead of 128."""
    if columns % LANES:
        return jnp.broadcast_to(x[:, :1], (x.shape[0], columns))
    return jnp.concatenate([x] * (columns // LANES), axis=1)


def _sum_by_lane(p: Float[Array, "rows keys"]) -> Float[Array, "rows 128"]:
    """Sums over the keys that share a lane. The total over lanes is the sum over all keys."""
    rows, keys = p.shape
    if keys % LANES:
        return jnp.broadcast_to(jnp.sum(p, axis=1, keepdims=True) * (1 / LANES), (rows, LANES))
    return functools.reduce(jnp.add, [p[:, at : at + LANES] for at in range(0, keys, LANES)])


def _precision(operand: Array) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if operand.dtype == jnp.float32 else None


def output(state: State) -> Float[Array, "rows lanes"]:
    """Returns the attention output of each row."""
    return state.acc / jnp.sum(state.l, axis=1, keepdims=True)


def log_sum_exp(state: State) -> Float[Array, "rows 128"]:
    """Returns the natural log of the sum of each row's exponentiated logits, repeated along lanes."""
    return (state.m + jnp.log2(jnp.sum(state.l, axis=1, keepdims=True))) * (1 / LOG2_E)


def pack_lanes(column: Float[Array, "rows 128"]) -> Float[Array, "rows_over_128 128"]:
    """Returns a dense array from one value per row, repeated along lanes: row `r` goes to `[r // 128, r % 128]`.

    Each row keeps only the lane where its value belongs. Summing 128 such rows then gives one dense row.
    """
    stacked = column.reshape(-1, 128, 128)
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, stacked.shape, axis) for axis in (1, 2))
    return jnp.sum(jnp.where(row == lane, stacked, 0), axis=1)
