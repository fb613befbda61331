from tiny_checkpoints import read_tiny


def test_norms_are_before_and_after():
    config = read_tiny("glm4")
    assert {(layer.pre_norm, layer.post_norm) for layer in config.layers} == {(config.final_norm, config.final_norm)}
    assert read_tiny("glm").layers[0].post_norm is None
