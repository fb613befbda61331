"""An engine serves under the settings that careful projects switch on, with the same answers.

All tests run with `jax_numpy_rank_promotion="raise"` and `jax_numpy_dtype_promotion="strict"` (conftest.py).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax_settings import SETTINGS
from tiny_checkpoints import random_weights, read_tiny, write_directory

from paged_attn_layer import load_model
from paged_attn_layer._src.engine.config import EngineConfig
from paged_attn_layer._src.engine.engine import Engine
from paged_attn_layer._src.models.decoder import Decoder

pytestmark = pytest.mark.once

CONFIG = EngineConfig(max_seqs=2, max_sequence_length=16, page_size=4, prefill_chunk=4)
PROMPTS = [[3, 1, 4, 1, 5, 9], [2, 7]]


@functools.cache
def tiny_model(model_type):
    return Decoder(read_tiny(model_type), rngs=nnx.Rngs(0))


def answers(engine):
    return [done.token_ids for done in engine.generate(PROMPTS, max_new_tokens=2)]


@functools.cache
def plain_answers(model_type):
    """The answers without a setting."""
    return answers(Engine(tiny_model(model_type), config=CONFIG))


@pytest.mark.parametrize(
    ("setting", "model_type"), [*((setting, "mixtral") for setting in SETTINGS), ("enable_x64", "llama")]
)
def test_answers_are_the_same(setting, model_type):
    expected, model = plain_answers(model_type), tiny_model(model_type)
    with SETTINGS[setting]():
        results = answers(Engine(model, config=CONFIG))
    assert results == expected


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_steps_after_warm_up_transfer_nothing_implicitly(model_type):
    engine = Engine(tiny_model(model_type), config=CONFIG)
    engine.warm_up()
    with jax.transfer_guard("disallow"):
        assert answers(engine) == plain_answers(model_type)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_checkpoint_is_loaded(setting, tmp_path):
    weights = random_weights()
    write_directory(tmp_path, weights)
    with SETTINGS[setting]():
        model = load_model(tmp_path, dtype=jnp.bfloat16)
    embedding = model.embed.embedding[...]
    assert embedding.dtype == jnp.bfloat16
    expected = weights["model.embed_tokens.weight"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(embedding), expected)
