"""Which keys a query sees, for every kernel.

The reference has its own mask, so that tests can compare the two. A tree mask replaces causality. With a tree mask, all
rows of a sequence see the keys before its first row. Of the new tokens, each row sees those whose bits are set.
"""

import jax.numpy as jnp

from paged_kernels._src.spec import AttentionSpec


def visible(spec: AttentionSpec, t, p, kv_len, in_tree=None):
    """True where a query at position `t` sees the key at position `p`.

    With a tree mask, `in_tree` is the result of `in_tree()`; otherwise None.
    """
    sees = p < kv_len
    if in_tree is not None:
        sees &= in_tree
    elif spec.causal:
        sees &= p <= t
    if spec.sliding_window is not None:
        sees &= t - p < spec.sliding_window
    return sees


def in_tree(words: list, first_new, p):
    """True where the tree mask shows a row the key at position `p`: an old key, or a new token whose bit is set.

    Args:
        words: the row's mask, int32: one array for each 32 new tokens.
        first_new: the position of its sequence's first new token.
        p: the key's position.
    """
    new = p - first_new
    word = words[0]
    for index in range(1, len(words)):
        word = jnp.where(new >> 5 == index, words[index], word)
    return (new < 0) | ((new < 32 * len(words)) & ((word >> (new & 31)) & 1 == 1))


def key_range(spec: AttentionSpec, t_lo, t_hi, kv_len, *, tree: bool = False):
    """Returns a range of positions (first, one past the last).

    It holds every key that queries at positions `t_lo` up to `t_hi` (exclusive) see.
    """
    first = jnp.zeros_like(t_lo) if spec.sliding_window is None else jnp.maximum(t_lo - spec.sliding_window + 1, 0)
    end = jnp.minimum(kv_len, t_hi) if spec.causal and not tree else kv_len
    return first, end


def fully_visible(spec: AttentionSpec, queries: tuple, keys: tuple, kv_len, first_new=None):
    """True if all queries in one range of positions see all keys in another.

    Both ranges are (first, one past the last). With a tree mask, `first_new` is the position of the sequence's first
    new token.
    """
    (t_lo, t_hi), (p_lo, p_hi) = queries, keys
    sees = p_hi <= kv_len
    if first_new is not None:
        sees &= p_hi <= first_new
    elif spec.causal:
        sees &= p_hi <= t_lo + 1
    if spec.sliding_window is not None:
        sees &= t_hi - 1 - p_lo < spec.sliding_window
    return sees
