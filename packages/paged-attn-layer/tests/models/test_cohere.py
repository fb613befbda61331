from tiny_checkpoints import read_tiny

from paged_attn_layer._src.blocks.norm import NormConfig

NORM = NormConfig(kind="layer", eps=0.5)


def test_attention_and_mlp_share_one_norm():
    config = read_tiny("cohere", layer_norm_eps=0.5, logit_scale=0.25)
    layer = config.layers[0]
    assert (layer.pre_norm, layer.post_norm, layer.parallel, config.final_norm) == (NORM, None, True, NORM)
    assert (config.logit_scale, layer.attention.qk_norm, layer.attention.rope.interleaved) == (0.25, None, True)


def test_each_head_may_have_a_norm_of_its_own():
    attention = read_tiny("cohere", layer_norm_eps=0.5, use_qk_norm=True).layers[0].attention
    assert (attention.qk_norm, attention.qk_norm_over) == (NORM, "each_head")
