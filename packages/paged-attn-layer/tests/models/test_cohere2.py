from tiny_checkpoints import read_tiny


def test_layers_with_a_window_turn_and_others_do_not():
    config = read_tiny("cohere2", num_hidden_layers=5, sliding_window=8)
    assert [layer.attention.sliding_window for layer in config.layers] == [8, 8, 8, None, 8]
    assert [layer.attention.rope is not None for layer in config.layers] == [True, True, True, False, True]
    assert all(layer.parallel for layer in config.layers)


def test_norms_of_queries_and_keys_are_cohere_1s():
    assert read_tiny("cohere2", use_qk_norm=True).layers[0].attention.qk_norm is None
