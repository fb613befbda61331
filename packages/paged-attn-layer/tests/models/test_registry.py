import pytest
from tiny_checkpoints import CONFIG

from paged_attn_layer._src.models import llama, mistral, qwen2
from paged_attn_layer._src.models.registry import find_family, find_gguf_family
from paged_cache import HFConfig


def test_by_architecture_else_by_model_type():
    assert find_family(HFConfig.of(CONFIG)) is llama.FAMILY
    assert find_family(HFConfig.of({"architectures": ["MistralForCausalLM"], "model_type": "llama"})) is mistral.FAMILY
    assert find_family(HFConfig.of({"architectures": None, "model_type": "qwen2"})) is qwen2.FAMILY


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"architectures": ["BertModel"]},
            "architecture 'BertModel' is not supported; supported are .*LlamaForCausalLM, .*MistralForCausalLM, ",
        ),
        ({"model_type": "bert"}, "architecture 'bert' is not supported; supported are .*LlamaForCausalLM"),
        ({}, "architecture None is not supported"),
    ],
)
def test_families_that_are_not_supported(config, message):
    with pytest.raises(NotImplementedError, match=message):
        find_family(HFConfig.of(config))


def test_architectures_is_a_list():
    with pytest.raises(ValueError, match=r"architectures='LlamaForCausalLM' must be a list of names"):
        find_family(HFConfig.of({"architectures": "LlamaForCausalLM"}))


def test_by_the_architecture_of_a_gguf_file():
    assert find_gguf_family("qwen2") == (qwen2.FAMILY, qwen2.FAMILY.gguf)
    with pytest.raises(NotImplementedError, match=r"None is not supported; supported are .*llama, .*qwen2"):
        find_gguf_family(None)
