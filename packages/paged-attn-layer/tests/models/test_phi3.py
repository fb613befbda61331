import pytest
from tiny_checkpoints import read_tiny

LONGROPE = {"short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0], "original_max_position_embeddings": 16}


@pytest.mark.parametrize("name", ["longrope", "su", "yarn"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_longrope_has_three_names(name, key):
    config = read_tiny("phi3", original_max_position_embeddings=16, **{key: {**LONGROPE, "type": name}})
    rope = config.layers[0].attention.rope
    assert (rope.rope_type, rope.freq_factors, rope.theta) == ("default", (1.0, 2.0), 1000.0)
    assert config.max_position_embeddings == 16


def test_a_part_of_each_head_turns():
    assert read_tiny("phi3", partial_rotary_factor=0.5).layers[0].attention.rope.rotary_dim == 2


def test_every_layer_has_the_window():
    assert [layer.attention.sliding_window for layer in read_tiny("phi3", sliding_window=8).layers] == [8, 8]
