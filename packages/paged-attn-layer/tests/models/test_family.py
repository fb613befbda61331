"""What must hold for the declarations of every family."""

import numpy as np
import pytest
from flax import nnx
from tiny_checkpoints import CONFIG, config_of

from paged_attn_layer._src.convert.weights import export_weights, match_weights
from paged_attn_layer._src.models.registry import FAMILIES
from paged_cache import HFConfig

SETTINGS = [{}, {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}]


class Checkpoint:
    """Arrays by name, as a source of weights."""

    where, problems, config = "memory", (), CONFIG

    def __init__(self, arrays):
        self.arrays = arrays
        self.shapes = {name: array.shape for name, array in arrays.items()}

    def weight(self, name):
        return self.arrays[name]


def random_model_weights(family, config):
    model = nnx.eval_shape(lambda: family.build(config, param_dtype=np.float32, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    return {".".join(map(str, keys)): rng.normal(size=w.shape) for keys, w in nnx.to_flat_state(nnx.state(model))}


def load(checkpoint, shapes, rules):
    made = {}
    for match in match_weights(checkpoint, shapes, rules):
        arrays = match.forward([checkpoint.weight(name) for name, _ in match.sources])
        made |= zip(match.targets, arrays, strict=True)
    return made


def assert_equal(made, given):
    assert made.keys() == given.keys()
    for name, array in given.items():
        np.testing.assert_array_equal(made[name], array)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_types[0])
@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "tied-biases"])
def test_weights_exported_and_loaded_are_the_same(family, settings):
    config = family.read_config(HFConfig.of(config_of(family, **settings)))
    weights, rules = random_model_weights(family, config), family.weights(config)
    shapes = {path: weight.shape for path, weight in weights.items()}
    assert_equal(load(Checkpoint(dict(export_weights(weights, rules))), shapes, rules), weights)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.gguf], ids=lambda family: family.model_types[0])
@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "tied-biases"])
def test_gguf_tensors_and_back_are_the_same(family, settings):
    """Every Hugging Face weight has its place in a GGUF file, and comes back from it."""
    config = family.read_config(HFConfig.of(config_of(family, **settings)))
    checkpoint = dict(export_weights(random_model_weights(family, config), family.weights(config)))
    rules = family.gguf.tensors(CONFIG)
    shapes = {name: weight.shape for name, weight in checkpoint.items()}
    tensors = dict(export_weights(checkpoint, rules))
    assert not any(name.startswith("model.") for name in tensors)
    assert_equal(load(Checkpoint(tensors), shapes, rules), checkpoint)
