import numpy as np
import pytest
from family_weights import Checkpoint, assert_equal, load, random_model_weights
from tiny_checkpoints import read_tiny

from paged_attn_layer import read_config
from paged_attn_layer._src.convert.weights import export_weights
from paged_attn_layer._src.models.gpt2 import FAMILY

FILE = {"model_type": "gpt2", "vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}


def test_its_keys_have_names_of_their_own():
    config = read_config(FILE | {"layer_norm_epsilon": 0.5})
    layer = config.layers[0]
    assert (config.hidden_size, config.max_position_embeddings, len(config.layers)) == (16, 64, 2)
    assert (layer.attention.num_heads, layer.attention.num_kv_heads, layer.attention.rope) == (4, 4, None)
    assert (layer.mlp.intermediate_size, layer.mlp.activation, layer.mlp.gated) == (64, "gelu_new", False)
    assert (layer.pre_norm.kind, layer.pre_norm.eps, layer.pre_norm.use_bias) == ("layer", 0.5, True)
    assert config.learned_positions
    assert config.tie_word_embeddings


def test_keys_that_it_does_not_read_change_nothing():
    other = {"num_key_value_heads": 2, "head_dim": 8, "rope_theta": 3.0, "sliding_window": 8, "intermediate_size": 24}
    assert read_config({**other, **FILE, "n_inner": None}) == read_config(FILE)


def test_the_scale_of_attention_is_as_the_file_says():
    def scales(**settings):
        return [layer.attention.softmax_scale for layer in read_tiny("gpt2", **settings).layers]

    assert scales() == [0.5, 0.5]
    assert scales(scale_attn_weights=False) == [1.0, 1.0]
    assert scales(scale_attn_by_inverse_layer_idx=True) == [0.5, 0.25]


def test_an_encoder_is_refused():
    with pytest.raises(NotImplementedError, match="add_cross_attention=True is not supported"):
        read_tiny("gpt2", add_cross_attention=True)


def test_files_with_and_without_the_first_part_of_names():
    """Both are on the Hub; old ones also have the causal mask."""
    config = read_config(FILE)
    weights, rules = random_model_weights(FAMILY, config), FAMILY.weights(config)
    shapes = {path: weight.shape for path, weight in weights.items()}
    exported = dict(export_weights(weights, rules))
    assert all(name.startswith("transformer.") for name in exported)
    old = {name.removeprefix("transformer."): weight for name, weight in exported.items()}
    old |= {"h.0.attn.bias": np.ones((1, 1, 64, 64)), "h.0.attn.masked_bias": np.zeros(())}
    for checkpoint in (exported, old):
        assert_equal(load(Checkpoint(checkpoint), shapes, rules), weights)
