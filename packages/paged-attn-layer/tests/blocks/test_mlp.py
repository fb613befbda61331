import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from paged_attn_layer._src.blocks.mlp import ACTIVATIONS, MLP, MLPConfig

X = np.random.default_rng(0).normal(0, 2, (5, 8)).astype(np.float32)


def gelu_tanh(x):
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


EQUATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "swish": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "relu": lambda x: np.maximum(x, 0),
}


def project(linear, x):
    return x @ np.asarray(linear.kernel[...], np.float64) + np.asarray(linear.bias[...], np.float64)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_is_the_equation(activation, gated):
    config = MLPConfig(hidden_size=8, intermediate_size=12, activation=activation, gated=gated, use_bias=True)
    mlp = MLP(config, rngs=nnx.Rngs(0))
    for linear in (mlp.up_proj, mlp.down_proj, *([mlp.gate_proj] if gated else [])):
        linear.bias[...] = jnp.linspace(-1, 1, linear.bias.size)
    act, up = EQUATIONS[activation], project(mlp.up_proj, X)
    inner = act(project(mlp.gate_proj, X)) * up if gated else act(up)
    np.testing.assert_allclose(mlp(jnp.asarray(X)), project(mlp.down_proj, inner), atol=1e-5)


def test_what_means_nothing_is_refused():
    with pytest.raises(ValueError, match="intermediate_size=0 must be at least 1"):
        MLPConfig(hidden_size=8, intermediate_size=0)
    with pytest.raises(NotImplementedError, match="activation 'quick_gelu' is not supported; silu, "):
        MLPConfig(hidden_size=8, intermediate_size=8, activation="quick_gelu")
