from tiny_checkpoints import read_tiny


def test_half_of_each_head_turns_in_neighbouring_pairs():
    attention = read_tiny("glm", head_dim=8).layers[0].attention
    assert (attention.rope.rotary_dim, attention.rope.interleaved) == (4, True)
    whole = read_tiny("glm", head_dim=8, partial_rotary_factor=1.0).layers[0].attention
    assert whole.rope.rotary_dim is None


def test_the_way_back_from_attention_has_no_bias():
    attention = read_tiny("glm").layers[0].attention
    assert (attention.qkv_bias, attention.out_bias) == (True, False)
    assert not read_tiny("glm", attention_bias=False).layers[0].attention.qkv_bias
