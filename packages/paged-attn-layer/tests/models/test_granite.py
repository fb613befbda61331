import pytest
from tiny_checkpoints import read_tiny


def test_factors_in_four_places():
    config = read_tiny(
        "granite", embedding_multiplier=12, attention_multiplier=0.5, residual_multiplier=0.25, logits_scaling=8
    )
    layer = config.layers[1]
    assert (config.embed_scale, layer.attention.softmax_scale, layer.residual_multiplier, config.logit_scale) == (
        *(12.0, 0.5, 0.25, 0.125),
    )


def test_without_factors_they_are_1():
    """That of attention too: it is not `head_dim ** -0.5`."""
    config = read_tiny("granite")
    assert (config.embed_scale, config.layers[0].attention.softmax_scale, config.logit_scale) == (1.0, 1.0, 1.0)


def test_a_factor_of_0_is_refused():
    with pytest.raises(ValueError, match="logits_scaling=0 must be a finite number above 0"):
        read_tiny("granite", logits_scaling=0)
