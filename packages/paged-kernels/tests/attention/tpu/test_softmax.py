"""The online softmax, block by block, against a softmax over all keys at once in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from paged_kernels._src.attention.tpu import softmax

ROWS, KEYS, LANES = 8, 256, 32


def empty_state():
    m, l = jnp.full((ROWS, 128), softmax.MASKED), jnp.zeros((ROWS, 128))  # noqa: E741
    return softmax.State(m, l, jnp.zeros((ROWS, LANES)))


def attend(state, q, k, v, mask, logits):
    x = jnp.where(mask, logits(softmax.score(q, k)), softmax.MASKED)
    return softmax.add_keys(state, x, v)


def data(seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape).astype(np.float32) for shape in ((ROWS, LANES), (KEYS, LANES), (KEYS, LANES)))


def expected(q, k, v, mask, scale, soft_cap):
    s = scale * q.astype(np.float64) @ k.T
    s = s if soft_cap is None else soft_cap * np.tanh(s / soft_cap)
    weights = np.exp(s) * mask
    return weights @ v / weights.sum(1, keepdims=True), np.log(weights.sum(1, keepdims=True))


@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("block", [16, 128, 256])
def test_blocks_add_up_to_the_whole(block, soft_cap):
    q, k, v = data()
    mask = np.arange(KEYS) <= np.arange(ROWS)[:, None] * 36 + 4  # the first rows see no key of the last blocks
    logits, state = softmax.Logits(scale=0.7, soft_cap=soft_cap), empty_state()
    for at in range(0, KEYS, block):
        keys = slice(at, at + block)
        state = attend(state, q, k[keys], v[keys], mask[:, keys], logits)
    out, lse = expected(q, k, v, mask, 0.7, soft_cap)
    np.testing.assert_allclose(softmax.output(state), out, atol=1e-5)
    np.testing.assert_allclose(softmax.log_sum_exp(state), np.broadcast_to(lse, (ROWS, 128)), atol=1e-5)


def test_a_block_of_masked_keys_leaves_no_trace():
    q, k, v = data(2)
    logits = softmax.Logits(scale=1.0, soft_cap=None)
    first = attend(empty_state(), q, 100 * k, v, False, logits)
    state = attend(first, q, k, v, True, logits)
    out, _ = expected(q, k, v, np.ones((ROWS, KEYS)), 1.0, None)
    np.testing.assert_allclose(softmax.output(state), out, atol=1e-5)


def test_large_logits_do_not_overflow():
    q, k, v = data(3)
    logits = softmax.Logits(scale=1.0, soft_cap=None)
    state = attend(empty_state(), 300 * q, k, v, True, logits)
    best = np.argmax(q @ k.T, axis=1)
    np.testing.assert_allclose(softmax.output(state), v[best], atol=1e-5)


def test_pack_lanes_makes_a_dense_array():
    column = jnp.where(jnp.arange(256) % 5 == 0, -jnp.inf, jnp.arange(256.0))[:, None]
    packed = softmax.pack_lanes(jnp.broadcast_to(column, (256, 128)))
    np.testing.assert_array_equal(packed.reshape(256), column[:, 0])
