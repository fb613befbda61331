"""The online softmax, as arrays."""

import jax.numpy as jnp
import numpy as np
import pytest

from paged_kernels._src.attention.xla.softmax import SoftmaxState, logits

NO_SINKS = jnp.full((2, 3), -jnp.inf)


def data(keys=12, head_dim=8):
    rng = np.random.default_rng(0)
    return rng.normal(size=(2, 3, keys)) * 3, rng.normal(size=(2, keys, head_dim))


def finish(state):
    return state.output(), state.lse()


@pytest.mark.parametrize("cuts", [[12], [6, 6], [1, 11], [5, 4, 3]])
def test_blocks_in_any_cut_give_the_softmax(cuts):
    s, v = data()
    state = SoftmaxState.initial(NO_SINKS, 8)
    for start, stop in zip(np.cumsum([0, *cuts[:-1]]), np.cumsum(cuts), strict=True):
        state = state.add_keys(jnp.float32(s[..., start:stop]), jnp.float32(v[:, start:stop]))
    out, lse = finish(state)
    weights = np.exp(s) / np.exp(s).sum(-1, keepdims=True)
    np.testing.assert_allclose(out, weights @ v, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse, np.log(np.exp(s).sum(-1)), rtol=1e-6)


def test_hidden_blocks_change_nothing():
    s, v = data()
    hidden = jnp.full(s.shape, -jnp.inf)
    seen = SoftmaxState.initial(NO_SINKS, 8).add_keys(jnp.float32(s), jnp.float32(v))
    around = (
        SoftmaxState.initial(NO_SINKS, 8)
        .add_keys(hidden, v)
        .add_keys(jnp.float32(s), jnp.float32(v))
        .add_keys(hidden, v)
    )
    for a, b in zip(finish(seen), finish(around), strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_key_gives_zeros_and_minus_infinity():
    out, lse = finish(SoftmaxState.initial(NO_SINKS, 8).add_keys(jnp.full((2, 3, 4), -jnp.inf), jnp.ones((2, 4, 8))))
    assert (np.asarray(out) == 0).all()
    assert np.isneginf(lse).all()


def test_large_logits_do_not_overflow():
    s = jnp.array([[[1e4, 1e4 - 1.0]]])
    out, lse = finish(SoftmaxState.initial(jnp.full((1, 1), -jnp.inf), 1).add_keys(s, jnp.array([[[1.0], [2.0]]])))
    np.testing.assert_allclose(out[0, 0, 0], 1 + 1 / (1 + np.e), rtol=1e-3)
    np.testing.assert_allclose(lse, 1e4 + np.log(1 + np.exp(-1)), rtol=1e-6)


def test_logits_are_capped():
    q, k = jnp.ones((1, 1, 4)), jnp.ones((1, 2, 4))
    np.testing.assert_allclose(logits(q, k, None), 4 * np.ones((1, 1, 2)))
    np.testing.assert_allclose(logits(q, k, 3.0), 3 * np.tanh(4 / 3) * np.ones((1, 1, 2)), rtol=1e-6)
