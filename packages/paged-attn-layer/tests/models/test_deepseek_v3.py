import pytest
from tiny_checkpoints import CONFIG, FAMILY_KEYS, read_tiny

from paged_attn_layer import read_config
from paged_attn_layer._src.convert.templates import parse
from paged_attn_layer._src.models import deepseek_v3


def test_the_router():
    router = read_tiny("deepseek_v3").layers[1].mlp.router
    assert (router.score, router.group_score, router.expert_groups, router.scale) == (
        "sigmoid",
        "two_largest",
        2,
        2.5,
    )
    assert router.use_choice_bias
    assert router.renormalise


def test_pairs_are_neighbours_unless_the_file_says_otherwise():
    assert read_tiny("deepseek_v3").layers[0].attention.rope.interleaved
    assert not read_tiny("deepseek_v3", rope_interleave=False).layers[0].attention.rope.interleaved


def test_kimi_k2_is_read_by_its_architecture():
    names = {"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"], "n_routed_experts": 4}
    keys = {key: value for key, value in FAMILY_KEYS["deepseek_v3"].items() if key != "num_local_experts"}
    assert read_config({**CONFIG, **keys, **names}) == read_tiny("deepseek_v3")


def test_the_layer_that_predicts_a_second_token_is_not_used():
    unused = [rule.sources[0] for rule in deepseek_v3.weights(read_tiny("deepseek_v3")) if not rule.targets]
    for name, expected in (("model.layers.2.eh_proj.weight", True), ("model.layers.1.mlp.gate.weight", False)):
        assert any(parse(template, name) is not None for template in unused) == expected


@pytest.mark.parametrize("settings", [{"scoring_func": "softmax"}, {"topk_method": "greedy"}])
def test_what_is_not_supported_is_refused_by_name(settings):
    ((key, value),) = settings.items()
    with pytest.raises(NotImplementedError, match=f"{key}={value!r} is not supported"):
        read_tiny("deepseek_v3", **settings)
