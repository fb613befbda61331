import pytest
from tiny_checkpoints import read_tiny

from paged_attn_layer._src.blocks.mlp import ClampedGLU


def test_what_transformers_assumes():
    config = read_tiny("gpt_oss", rope_theta=150000.0, head_dim=64)
    windowed, full = (layer.attention for layer in config.layers)
    assert (windowed.sliding_window, full.sliding_window) == (128, None)
    assert windowed.sinks
    assert windowed.qkv_bias
    assert windowed.out_bias
    rope = full.rope
    assert (rope.rope_type, rope.factor, rope.truncate, rope.original_max_position) == ("yarn", 32.0, False, 4096)
    assert config.layers[0].mlp.expert.activation == ClampedGLU(alpha=1.702, limit=7.0)


def test_the_router_has_a_bias_and_weights_that_sum_to_1():
    router = read_tiny("gpt_oss").layers[0].mlp.router
    assert router.use_bias
    assert router.renormalise
    assert router.score == "softmax"


def test_a_limit_that_means_nothing_is_refused():
    with pytest.raises(ValueError, match="swiglu_limit=0 must be"):
        read_tiny("gpt_oss", swiglu_limit=0)
