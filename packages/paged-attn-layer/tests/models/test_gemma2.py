import pytest
from tiny_checkpoints import CONFIG, finish, gguf_writer

from paged_attn_layer import read_config
from paged_attn_layer._src.convert.gguf_file import GGUFFile


def config(**settings):
    return read_config({**CONFIG, "architectures": ["Gemma2ForCausalLM"], **settings})


def test_what_a_file_leaves_out():
    model = config()
    attention = model.layers[0].attention
    assert (attention.softmax_scale, attention.soft_cap, model.logit_soft_cap) == (1 / 16, 50, 30)
    assert [layer.attention.sliding_window for layer in model.layers] == [4096, None]
    assert (model.embed_scale, model.tie_word_embeddings, model.end_token_ids) == (4, True, {1})
    assert model.layers[0].post_norm == model.final_norm


def test_null_means_no_cap():
    model = config(attn_logit_softcapping=None, final_logit_softcapping=None)
    assert (model.layers[0].attention.soft_cap, model.logit_soft_cap) == (None, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        ({"hidden_activation": "quick_gelu"}, "activation 'quick_gelu' is not supported"),
    ],
)
def test_what_changes_the_result_is_never_ignored(settings, message):
    with pytest.raises(NotImplementedError, match=message):
        config(**settings)


@pytest.mark.parametrize(("layers", "scalar"), [(2, 8), (46, 4)])
def test_a_gguf_file(tmp_path, layers, scalar):
    """llama.cpp knows Gemma 2 27B by its 46 layers. Its scale is 144 ** -0.5: hidden size over heads."""
    sizes = {"attention.key_length": 8, "attention.value_length": 8, "rope.dimension_count": 8}
    settings = {"attention.sliding_window": 6, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0}
    finish(gguf_writer(tmp_path / "model.gguf", "gemma2", block_count=layers, **sizes, **settings))
    model = read_config(GGUFFile(tmp_path / "model.gguf").config)
    attention = model.layers[0].attention
    assert (attention.softmax_scale, attention.soft_cap, model.logit_soft_cap) == (scalar**-0.5, 20, 10)
    assert [layer.attention.sliding_window for layer in model.layers[:2]] == [6, None]
