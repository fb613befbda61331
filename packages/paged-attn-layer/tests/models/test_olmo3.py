import pytest
from tiny_checkpoints import read_tiny

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}


def ropes(**settings):
    return [layer.attention.rope for layer in read_tiny("olmo3", **KINDS, **settings).layers]


def test_scaling_is_for_layers_that_see_all_keys():
    windowed, full = ropes(rope_scaling=YARN, rope_theta=500000.0)
    assert (windowed.rope_type, windowed.theta, full.rope_type, full.theta) == ("default", 5e5, "yarn", 5e5)


def test_a_base_beside_the_settings_is_for_layers_that_see_all_keys():
    """So transformers 5.23 reads a file that has no `rope_parameters`."""
    windowed, full = ropes(rope_theta=1000.0)
    assert (windowed.theta, full.theta) == (500000.0, 1000.0)


def test_settings_by_type_of_layer():
    by_type = {"full_attention": {**YARN, "rope_theta": 3.0}, "sliding_attention": {"rope_theta": 5.0}}
    windowed, full = ropes(rope_parameters=by_type)
    assert (windowed.rope_type, windowed.theta, full.rope_type, full.theta) == ("default", 5.0, "yarn", 3.0)


def test_settings_for_all_layers_are_refused():
    with pytest.raises(ValueError, match=r"rope_parameters=\{'rope_theta': 3.0\} must have settings under full_attent"):
        ropes(rope_parameters={"rope_theta": 3.0})


def test_three_of_four_layers_have_the_window():
    config = read_tiny("olmo3", num_hidden_layers=5)
    assert [layer.attention.sliding_window for layer in config.layers] == [4096, 4096, 4096, None, 4096]
