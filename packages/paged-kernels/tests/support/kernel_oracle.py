"""The oracle: attention as in the equation, in float64 on keys and values in plain order; and the check of a result."""

import jax.numpy as jnp
import numpy as np

from paged_kernels import AttentionSpec, HeadParams

TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
"""The largest error of an output row, relative to the largest magnitude in the row."""
NO_PARAMS = HeadParams()


def attend_one(q, k, v, spec: AttentionSpec, *, heads: HeadParams = NO_PARAMS, t0: int | None = None, tree=None):
    """Returns output and lse of one sequence: its rows `q [rows, q_heads, d]` over all its keys `[keys, kv_heads, d]`.

    The rows are its newest tokens, unless `t0` is the position of the first one. `tree [rows, new tokens]` replaces
    causality.
    """
    k, v = (np.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    s = np.einsum("thd,phd->thp", q, k) * (q.shape[2] ** -0.5 if spec.softmax_scale is None else spec.softmax_scale)
    if spec.soft_cap is not None:
        s = spec.soft_cap * np.tanh(s / spec.soft_cap)
    t0 = len(k) - len(q) if t0 is None else t0
    t, p = t0 + np.arange(len(q))[:, None], np.arange(len(k))
    if heads.alibi_slopes is not None:
        s -= np.asarray(heads.alibi_slopes, np.float64)[:, None] * np.abs(t - p)[:, None]
    seen = (p <= t) | (not spec.causal) if tree is None else sees_in_tree(tree, p - t0)
    if spec.sliding_window is not None:
        seen &= p > t - spec.sliding_window
    s = np.where(seen[:, None], s, -np.inf)
    return softmax_over(s, v, np.full(q.shape[1], -np.inf) if heads.sinks is None else np.asarray(heads.sinks))


def sees_in_tree(tree: np.ndarray, new: np.ndarray) -> np.ndarray:
    """True where a row sees a key: new tokens `new [keys]` by the tree mask, older ones (below 0) always."""
    bits = tree[:, np.clip(new, 0, tree.shape[1] - 1)]
    return (new < 0) | (bits & (new < tree.shape[1]))


def softmax_over(s: np.ndarray, v: np.ndarray, sinks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns `softmax(s) v` with one more logit per head in the denominator, and its log. Rows of -inf give zeros."""
    sinks = np.broadcast_to(sinks.astype(np.float64), s.shape[:2])[..., None]
    top = np.concatenate([s, sinks], axis=-1).max(axis=-1, keepdims=True, initial=-1e30)
    weights = np.exp(s - top)
    total = weights.sum(axis=-1) + np.exp(sinks - top)[..., 0]
    with np.errstate(divide="ignore"):
        lse = top[..., 0] + np.log(total)
    return np.einsum("thp,phd->thd", weights, v) / np.where(total > 0, total, 1)[..., None], lse


def row_errors(actual, expected) -> np.ndarray:
    """The largest error in each row (last axis), relative to the largest expected magnitude. NaN counts as inf."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    error = np.abs(actual - expected).max(axis=-1)
    scale = np.abs(expected).max(axis=-1)
    relative = np.divide(error, scale, out=np.where(error == 0, 0.0, np.inf), where=scale > 0)
    return np.where(np.isnan(relative), np.inf, relative)


def assert_rows_close(actual, expected, dtype) -> None:
    """Each row of `actual` is within the type's tolerance of `expected`. A row of zeros must be exactly zero."""
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    limit = TOLERANCE[jnp.dtype(dtype).name]
    errors = row_errors(actual, expected)
    if not errors.size or errors.max() <= limit:
        return
    at = tuple(map(int, np.unravel_index(errors.argmax(), errors.shape)))
    raise AssertionError(
        f"{(errors > limit).sum()} of {errors.size} rows are off by more than {limit:g} of their scale; "
        f"the worst is row (token, head) {at}, off by {errors[at]:.3g}:\n"
        f"  actual   {np.asarray(actual[at], np.float64)[:6]} ...\n"
        f"  expected {np.asarray(expected[at], np.float64)[:6]} ..."
    )


def assert_lse_close(actual, expected, dtype="float32") -> None:
    """The log-sum-exp agrees absolutely to the type's tolerance, and is -inf exactly where no key is visible."""
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=4 * TOLERANCE[str(dtype)])
