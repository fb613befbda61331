import pytest
from tiny_checkpoints import CONFIG, read_tiny

from paged_attn_layer import read_config
from paged_attn_layer._src.blocks.attention import QueryGrowth

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def test_queries_grow_with_their_position():
    attention = read_tiny("ministral3", rope_parameters={**YARN, "llama_4_scaling_beta": 0.5}).layers[1].attention
    assert (attention.query_growth, attention.rope.rope_type) == (QueryGrowth(beta=0.5, tokens=16), "yarn")


def test_a_file_without_rotary_settings_has_those_of_its_type():
    attention = read_tiny("ministral3").layers[0].attention
    assert attention.query_growth == QueryGrowth(beta=0.1, tokens=16384)
    assert (attention.rope.factor, attention.rope.theta) == (16.0, 1000000.0)


def test_growth_is_never_guessed():
    with pytest.raises(ValueError, match="the config has no llama_4_scaling_beta"):
        read_tiny("ministral3", rope_parameters=YARN)


@pytest.mark.parametrize(("text", "growth"), [("mistral", None), ("ministral3", QueryGrowth(beta=0.1, tokens=16384))])
def test_the_text_of_a_model_that_sees_pictures_may_be_either(text, growth):
    nested = {**CONFIG, "architectures": None, "model_type": text}
    config = read_config({"architectures": ["Mistral3ForConditionalGeneration"], "text_config": nested})
    assert config.layers[0].attention.query_growth == growth
