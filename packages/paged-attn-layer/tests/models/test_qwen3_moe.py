import pytest
from tiny_checkpoints import read_tiny

from paged_attn_layer._src.blocks.moe import MoEConfig


def experts(**settings):
    """Whether each layer has experts."""
    config = read_tiny("qwen3_moe", num_hidden_layers=4, **settings)
    return [isinstance(layer.mlp, MoEConfig) for layer in config.layers]


def test_which_layers_have_experts():
    assert experts() == [True] * 4
    assert experts(mlp_only_layers=[0, 2]) == [False, True, False, True]
    assert experts(decoder_sparse_step=3) == [False, False, True, False]


def test_experts_have_a_size_of_their_own():
    moe = read_tiny("qwen3_moe", moe_intermediate_size=10).layers[0].mlp
    assert (moe.expert.intermediate_size, moe.router.num_experts, moe.router.renormalise) == (10, 4, False)


def test_old_files_count_experts_under_another_name():
    assert read_tiny("qwen3_moe", num_local_experts=None, num_experts=6).layers[0].mlp.router.num_experts == 6


def test_every_layer_has_the_window_or_none():
    layers = read_tiny("qwen3_moe", use_sliding_window=True, sliding_window=8, max_window_layers=1).layers
    assert [layer.attention.sliding_window for layer in layers] == [8, 8]
    assert read_tiny("qwen3_moe", sliding_window=8).layers[0].attention.sliding_window is None


@pytest.mark.parametrize("layers", [[4], [True], "all", [-1]])
def test_layers_that_are_not_there_are_refused(layers):
    with pytest.raises(ValueError, match="mlp_only_layers"):
        experts(mlp_only_layers=layers)
