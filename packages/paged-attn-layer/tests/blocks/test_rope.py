import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from paged_attn_layer import RopeConfig, apply_rope
from paged_attn_layer._src.blocks.rope import rope_frequencies

LLAMA3 = {"rope_type": "llama3", "theta": 500000.0, "factor": 8.0, "original_max_position": 64}
X = np.arange(16, dtype=np.float32) / 8 - 1

# Frequencies, and X turned to position 300: transformers 5 (LlamaRotaryEmbedding, apply_rotary_pos_emb), head_dim 16.
HUGGING_FACE = {
    "default": (
        {},
        [1, 0.31622776, 0.1, 0.031622779, 0.0099999998, 0.0031622779, 0.001, 0.00031622779],
        [
            0.022096619,
            -0.78454828,
            0.13131931,
            0.64705294,
            0.42443624,
            -0.72643816,
            -0.46047431,
            -0.20732325,
            0.99975586,
            -0.40710428,
            0.77958655,
            -0.33551833,
            -0.56555623,
            0.059477627,
            0.64262229,
            0.85922468,
        ],
    ),
    "linear": (
        {"rope_type": "linear", "factor": 4.0},
        [0.25, 0.079056941, 0.025, 0.0079056947, 0.0024999999, 0.00079056947, 0.00025000001, 7.9056947e-05],
        [
            -0.92175126,
            -0.011703186,
            -0.49447647,
            0.18772498,
            -0.70666385,
            -0.51134849,
            -0.30549449,
            -0.14571536,
            0.38778165,
            0.88380599,
            -0.61684114,
            -0.7042793,
            0.02502504,
            0.51939654,
            0.72915918,
            0.87178957,
        ],
    ),
    "llama3": (
        LLAMA3,
        [1, 0.079403013, 0.0047007538, 0.00091158313, 0.00017677668, 3.4281024e-05, 6.6478697e-06, 1.2891732e-06],
        [
            0.022096619,
            -0.10323285,
            -0.36669493,
            -0.70305347,
            -0.52580112,
            -0.38140777,
            -0.25149527,
            -0.12533841,
            0.99975586,
            0.87783426,
            -0.70038193,
            0.19226505,
            0.47279295,
            0.62111044,
            0.74949992,
            0.8749516,
        ],
    ),
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_frequencies_and_rotation_are_hugging_face_s(name):
    config, frequencies, turned = HUGGING_FACE[name]
    config = RopeConfig(**config)
    assert_allclose(rope_frequencies(16, config), frequencies, rtol=1e-6)
    out = apply_rope(jnp.asarray(X)[None, None], jnp.array([300], jnp.int32), config)
    assert_allclose(out.ravel(), turned, atol=5e-5)


def test_divided_frequencies_are_llama_3s():
    """A GGUF file states the scaling of Llama 3 by the divisors that come of it."""
    plain, scaled = (rope_frequencies(16, RopeConfig(**fields)) for fields in ({"theta": 500000.0}, LLAMA3))
    divided = RopeConfig(theta=500000.0, freq_factors=tuple((plain / scaled).tolist()))
    assert_allclose(rope_frequencies(16, divided), scaled, rtol=1e-6)
    linear = RopeConfig(theta=500000.0, freq_factors=divided.freq_factors, rope_type="linear", factor=4.0)
    assert_allclose(rope_frequencies(16, linear), scaled / 4, rtol=1e-6)
    with pytest.raises(ValueError, match="freq_factors has 8 entries; it must have 16, one for each pair"):
        rope_frequencies(32, divided)


def test_each_pair_turns_as_a_complex_number():
    x = np.random.default_rng(0).standard_normal((5, 3, 8)).astype(np.float32)
    positions = np.array([0, 1, 7, 100, 1000], np.int32)
    turn = positions[:, None] * 10000.0 ** (-np.arange(4) / 4)
    z = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * turn)[:, None]
    out = apply_rope(jnp.asarray(x), jnp.asarray(positions), RopeConfig())
    assert_allclose(out, np.concatenate([z.real, z.imag], -1), atol=1e-4)


def test_it_computes_in_float32_and_returns_the_dtype_given():
    x, positions = jnp.asarray(X, jnp.bfloat16)[None, None], jnp.array([4097], jnp.int32)
    out = apply_rope(x, positions, RopeConfig())
    assert out.dtype == jnp.bfloat16
    exact = apply_rope(x.astype(jnp.float32), positions, RopeConfig())
    assert_allclose(out.astype(jnp.float32), exact, rtol=2**-8)


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"rope_type": "su"}, NotImplementedError, "rope_type='su' is not supported; default, linear, llama3, yarn, "),
        ({"rope_type": "yarn", "theta": 1.0}, ValueError, "theta=1.0 must be above 1"),
        ({"rotary_dim": 3}, ValueError, "rotary_dim=3 must be even"),
        ({"attention_factor": 0.0}, ValueError, "attention_factor=0.0 must be positive"),
        ({"theta": 0.0}, ValueError, "theta=0.0 must be positive"),
        ({"factor": float("inf")}, ValueError, "factor=inf must be positive and finite"),
        ({"freq_factors": (1.0, 0.0)}, ValueError, r"freq_factors\[1\]=0.0 must be positive and finite"),
        ({"high_freq_factor": 1.0}, ValueError, "low_freq_factor=1.0 must be below high_freq_factor=1.0"),
    ],
)
def test_what_means_nothing_is_refused(fields, error, match):
    with pytest.raises(error, match=match):
        RopeConfig(**fields)


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="head_dim=15 must be even"):
        rope_frequencies(15, RopeConfig())
    with pytest.raises(ValueError, match="rotary_dim=18 must be at most head_dim=16"):
        rope_frequencies(16, RopeConfig(rotary_dim=18))


def turned(x, positions, config):
    return np.asarray(apply_rope(jnp.asarray(x), jnp.asarray(positions), config))


def test_a_part_of_a_head_turns_and_the_rest_stays():
    x = np.random.default_rng(0).standard_normal((4, 3, 8)).astype(np.float32)
    positions = np.array([0, 3, 9, 70], np.int32)
    out = turned(x, positions, RopeConfig(rotary_dim=4, attention_factor=1.5))
    assert_allclose(out[..., :4], 1.5 * turned(x[..., :4], positions, RopeConfig()), rtol=1e-6)
    np.testing.assert_array_equal(out[..., 4:], x[..., 4:])


def test_neighbours_are_pairs_where_interleaved():
    x = np.random.default_rng(0).standard_normal((4, 3, 8)).astype(np.float32)
    positions = np.array([0, 3, 9, 70], np.int32)
    halves = np.concatenate([x[..., ::2], x[..., 1::2]], axis=-1)
    want, out = turned(halves, positions, RopeConfig()), turned(x, positions, RopeConfig(interleaved=True))
    assert_allclose(np.concatenate([out[..., ::2], out[..., 1::2]], axis=-1), want, rtol=1e-6)


def test_proportional_leaves_the_last_pairs_of_the_whole_head():
    x = np.random.default_rng(0).standard_normal((1, 3, 8)).astype(np.float32)
    out = turned(x, np.array([5], np.int32), RopeConfig(rope_type="proportional", rotary_dim=4))
    moved = np.abs(out - x).max(axis=(0, 1)) > 1e-3
    assert moved.tolist() == [True, True, False, False] * 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"theta": 1e-45},
        {"factor": 1e-39},
        {"factor": 1e-300},
        {"freq_factors": (1.0, 1e-40)},
        {"attention_factor": 1e39},
    ],
)
def test_numbers_that_give_no_finite_angle(wrong):
    with pytest.raises(ValueError, match="must give angles that are finite in float32"):
        RopeConfig(rope_type="linear", **wrong)
