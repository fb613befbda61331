import pytest
from tiny_checkpoints import CONFIG

from paged_attn_layer._src.models import llama, mistral, qwen2
from paged_attn_layer._src.models.registry import find_family, find_gguf_family


def test_by_architecture_else_by_model_type():
    assert find_family(CONFIG) is llama.FAMILY
    assert find_family({"architectures": ["MistralForCausalLM"], "model_type": "llama"}) is mistral.FAMILY
    assert find_family({"architectures": None, "model_type": "qwen2"}) is qwen2.FAMILY


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"architectures": ["MixtralForCausalLM"]},
            "architecture 'MixtralForCausalLM' is not supported; supported are LlamaForCausalLM, MistralForCausalLM, ",
        ),
        ({"model_type": "bert"}, "model_type='bert' is not supported; supported are llama, mistral, qwen2"),
        ({}, "the config has no architectures, and model_type=None is not supported"),
    ],
)
def test_families_that_are_not_supported(config, message):
    with pytest.raises(NotImplementedError, match=message):
        find_family(config)


def test_architectures_is_a_list():
    with pytest.raises(ValueError, match=r"architectures='LlamaForCausalLM' must be a list"):
        find_family({"architectures": "LlamaForCausalLM"})


def test_by_the_architecture_of_a_gguf_file():
    assert find_gguf_family("qwen2") == (qwen2.FAMILY, qwen2.FAMILY.gguf)
    with pytest.raises(NotImplementedError, match="architecture None is not supported; supported are llama, qwen2"):
        find_gguf_family(None)
