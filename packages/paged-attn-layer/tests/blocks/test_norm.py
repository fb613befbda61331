import jax.numpy as jnp
import numpy as np
import pytest

from paged_attn_layer._src.blocks.norm import Norm, NormConfig

X = np.random.default_rng(0).normal(1.0, 2.0, (3, 2, 8)).astype(np.float32)


def normed(x, config, scale=1.0, bias=0.0):
    x = np.asarray(x, np.float64)
    if config.kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.eps) * scale + bias


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_it_is_the_equation(kind, offset):
    config = NormConfig(kind=kind, eps=0.1, offset=offset, use_bias=True)
    norm, weights = Norm(8, config), np.linspace(-1, 1, 8, dtype=np.float32)
    norm.scale[...], norm.bias[...] = jnp.asarray(weights), jnp.asarray(weights**2)
    np.testing.assert_allclose(norm(jnp.asarray(X)), normed(X, config, weights + offset, weights**2), atol=1e-5)


def test_rows_of_the_last_axis_may_have_weights_of_their_own():
    norm, weights = Norm((2, 8), NormConfig(use_bias=True)), np.linspace(-1, 1, 16, dtype=np.float32).reshape(2, 8)
    norm.scale[...], norm.bias[...] = jnp.asarray(weights), jnp.asarray(weights**2)
    np.testing.assert_allclose(norm(jnp.asarray(X)), normed(X, norm.config, weights, weights**2), atol=1e-5)


@pytest.mark.parametrize("config", [NormConfig(), NormConfig(offset=1.0), NormConfig(use_scale=False)])
def test_a_new_norm_changes_no_scale(config):
    np.testing.assert_allclose(Norm(8, config)(jnp.asarray(X)), normed(X, config), atol=1e-5)


def test_it_computes_in_float32_and_returns_the_type_given():
    norm, x = Norm(8, NormConfig(), param_dtype=jnp.bfloat16), jnp.asarray(X, jnp.bfloat16)
    assert norm(x).dtype == jnp.bfloat16
    exact = norm(x.astype(jnp.float32))
    np.testing.assert_array_equal(norm(x), exact.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"kind": "batch"}, "kind='batch' must be 'rms' or 'layer'"),
        ({"eps": 0.0}, "eps=0.0 must be above 0 and finite, in float32"),
        ({"eps": 1e-50}, "eps=1e-50 must be above 0"),
        ({"eps": float("nan")}, "eps=nan must be above 0"),
    ],
)
def test_what_means_nothing_is_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        NormConfig(**fields)
