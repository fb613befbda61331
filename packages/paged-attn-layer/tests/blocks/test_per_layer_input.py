"""What inputs per layer compute is tested in `models/test_decoder.py`, against the equation of a whole decoder."""

import jax.numpy as jnp
import pytest
from flax import nnx

from paged_attn_layer._src.blocks.norm import NormConfig
from paged_attn_layer._src.blocks.per_layer_input import PerLayerInputConfig, PerLayerInputs

CONFIG = PerLayerInputConfig(hidden_size=8, size=4, norm=NormConfig())


def test_each_layer_has_a_row_of_its_own_for_each_token():
    inputs = PerLayerInputs(CONFIG, num_layers=3, vocab_size=10, rngs=nnx.Rngs(0))
    assert inputs(jnp.array([[1, 2]], jnp.int32), jnp.ones((1, 2, 8))).shape == (1, 2, 3, 4)


def test_what_means_nothing_is_refused():
    with pytest.raises(ValueError, match="size=0 must be at least 1"):
        PerLayerInputConfig(hidden_size=8, size=0, norm=NormConfig())
    with pytest.raises(NotImplementedError, match="activation 'swishy' is not supported"):
        PerLayerInputConfig(hidden_size=8, size=4, norm=NormConfig(), activation="swishy")
