import pytest
from tiny_checkpoints import read_tiny

DENSE = {"num_local_experts": 0, "layer_types": ["attention", "attention"], "shared_intermediate_size": 40}


def test_a_dense_model_has_the_mlp_that_experts_would_share():
    config = read_tiny("granitemoehybrid", **DENSE, logits_scaling=2, position_embedding_type="rope")
    assert (config.layers[0].mlp.intermediate_size, config.logit_scale) == (40, 0.5)
    assert config.layers[0].attention.rope is not None


@pytest.mark.parametrize("kind", [None, "nope"])
def test_without_rotary_embedding(kind):
    config = read_tiny("granitemoehybrid", **DENSE, position_embedding_type=kind)
    assert [layer.attention.rope for layer in config.layers] == [None, None]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_local_experts": 8}, "num_local_experts=8 is not supported in Granite 4"),
        ({"layer_types": ["mamba", "attention"]}, "a model with mamba_d_state is not supported"),
        ({"layer_types": None}, "a model with mamba_d_state is not supported"),
    ],
)
def test_mamba_and_experts_are_refused(settings, message):
    with pytest.raises(NotImplementedError, match=message):
        read_tiny("granitemoehybrid", **{**DENSE, **settings})
