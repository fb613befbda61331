import pytest
from tiny_checkpoints import read_tiny


def test_experts_are_as_wide_as_the_mlp_of_other_models():
    moe = read_tiny("mixtral").layers[1].mlp
    assert (moe.expert.intermediate_size, moe.router.num_experts, moe.router.experts_per_token) == (24, 8, 2)
    assert moe.router.renormalise
    assert moe.shared is None


def test_every_layer_has_the_window_or_none():
    assert read_tiny("mixtral").layers[0].attention.sliding_window is None
    assert [layer.attention.sliding_window for layer in read_tiny("mixtral", sliding_window=8).layers] == [8, 8]


def test_more_experts_per_token_than_there_are_is_refused():
    with pytest.raises(ValueError, match="experts_per_token=9 must be from 1 to 8"):
        read_tiny("mixtral", num_experts_per_tok=9)
