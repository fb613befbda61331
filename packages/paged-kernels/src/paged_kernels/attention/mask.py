"""Which keys a query sees, for every kernel; the reference has a mask of its own, to differ from."""

import jax.numpy as jnp

from paged_kernels.spec import AttentionSpec


def visible(spec: AttentionSpec, t, p, kv_len):
    """Whether a query at position `t` sees the key at position `p`, elementwise."""
    sees = p < kv_len
    if spec.causal:
        sees &= p <= t
    if spec.sliding_window is not None:
        sees &= t - p < spec.sliding_window
    return sees


def key_range(spec: AttentionSpec, t_lo, t_hi, kv_len):
    """The range of positions that hold every key visible to queries at positions `t_lo` up to `t_hi` (exclusive)."""
    first = jnp.zeros_like(t_lo) if spec.sliding_window is None else jnp.maximum(t_lo - spec.sliding_window + 1, 0)
    end = jnp.minimum(kv_len, t_hi) if spec.causal else kv_len
    return first, end


def fully_visible(spec: AttentionSpec, queries: tuple, keys: tuple, kv_len):
    """Whether all queries of a range of positions see all keys of another; both as (first, one past the last)."""
    (t_lo, t_hi), (p_lo, p_hi) = queries, keys
    sees = p_hi <= kv_len
    if spec.causal:
        sees &= p_hi <= t_lo + 1
    if spec.sliding_window is not None:
        sees &= t_hi - 1 - p_lo < spec.sliding_window
    return sees
