from tiny_checkpoints import read_tiny


def test_norms_are_after_attention_and_mlp_and_over_all_heads():
    config = read_tiny("olmo2", attention_bias=True)
    layer = config.layers[0]
    assert (layer.pre_norm, layer.post_norm, layer.attention.qk_norm) == (None, config.final_norm, config.final_norm)
    assert layer.attention.qk_norm_over == "projection"
    assert (layer.attention.qkv_bias, layer.attention.out_bias, layer.mlp.use_bias) == (True, True, False)
