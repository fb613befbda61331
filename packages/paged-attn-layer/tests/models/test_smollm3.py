from tiny_checkpoints import read_tiny


def has_rope(**settings):
    return [layer.attention.rope is not None for layer in read_tiny("smollm3", num_hidden_layers=5, **settings).layers]


def test_every_fourth_layer_has_no_rotary_embedding():
    assert has_rope() == [True, True, True, False, True]
    assert has_rope(no_rope_layer_interval=2) == [True, False, True, False, True]
    assert has_rope(no_rope_layers=[0, 1, 1, 1, 0]) == [False, True, True, True, False]


def test_biases_are_as_the_file_says():
    layer = read_tiny("smollm3", attention_bias=True, mlp_bias=True).layers[0]
    assert (layer.attention.qkv_bias, layer.attention.out_bias, layer.mlp.use_bias) == (True, True, True)
