"""Weights of families as plain arrays: made, exported, and loaded again."""

import numpy as np
from flax import nnx

from paged_attn_layer._src.convert.weights import match_weights


class Checkpoint:
    """Arrays by name, as a source of weights."""

    where, problems, config = "memory", (), {}

    def __init__(self, arrays):
        self.arrays = arrays
        self.shapes = {name: array.shape for name, array in arrays.items()}

    def weight(self, name):
        return self.arrays[name]


def random_model_weights(family, config):
    """Weights of a model with this config by path: multiples of 1/256, of which sums with whole numbers are exact."""
    model = nnx.eval_shape(lambda: family.build(config, param_dtype=np.float32, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    return {
        ".".join(map(str, keys)): rng.integers(-512, 513, w.shape) / 256
        for keys, w in nnx.to_flat_state(nnx.state(model))
    }


def load(checkpoint, shapes, rules):
    """The model's weights that the rules make of a checkpoint, by path."""
    made = {}
    for match in match_weights(checkpoint, shapes, rules):
        arrays = match.forward([checkpoint.weight(name) for name, _ in match.sources])
        made |= zip(match.targets, arrays, strict=True)
    return made


def assert_equal(made, given):
    """Two mappings have the same arrays, bit for bit."""
    assert made.keys() == given.keys()
    for name, array in given.items():
        np.testing.assert_array_equal(made[name], array)
