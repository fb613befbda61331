import dataclasses

import numpy as np
import pytest
from tiny_checkpoints import CONFIG, finish, gguf_writer

from paged_attn_layer import read_config
from paged_attn_layer._src.convert.gguf_file import GGUFFile

GEMMA_3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "eos_token_id": [1, 106],
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}
"""The published config.json of google/gemma-3-4b-it, which leaves out most keys."""


def config(**settings):
    return read_config({**CONFIG, "architectures": ["Gemma3ForCausalLM"], "sliding_window_pattern": 2, **settings})


def test_the_text_of_a_model_that_sees_pictures():
    model = read_config(GEMMA_3_4B)
    assert (model.vocab_size, model.max_position_embeddings, model.tie_word_embeddings) == (262208, 131072, True)
    assert (model.embed_scale, model.logit_soft_cap) == (2560**0.5, None)
    windowed, full = model.layers[0].attention, model.layers[5].attention
    assert (windowed.num_heads, windowed.num_kv_heads, windowed.head_dim, windowed.softmax_scale) == (8, 4, 256, 1 / 16)
    assert [layer.attention.sliding_window for layer in model.layers[:6]] == [1024] * 5 + [None]
    assert (windowed.rope.theta, windowed.rope.rope_type) == (10_000, "default")
    assert (full.rope.theta, full.rope.rope_type, full.rope.factor) == (1_000_000, "linear", 8)
    assert model.layers[0].mlp.activation == "gelu_pytorch_tanh"
    assert windowed.qk_norm.offset == model.layers[0].pre_norm.offset == model.final_norm.offset == 1


def test_settings_of_the_whole_count_beside_the_texts():
    assert not read_config({**GEMMA_3_4B, "tie_word_embeddings": False}).tie_word_embeddings


def test_rotary_settings_of_both_kinds_of_layers():
    def thetas(**settings):
        return [layer.attention.rope.theta for layer in config(**settings).layers]

    assert thetas(rope_theta=50.0) == [10_000, 50]
    assert thetas(rope_theta=50.0, rope_local_base_freq=20.0) == [20, 50]
    nested = {"sliding_attention": {"rope_theta": 30.0}, "full_attention": {"rope_theta": 60.0}}
    assert thetas(rope_parameters=nested) == [30, 60]
    assert thetas(rope_parameters={**nested, "sliding_attention": None}, rope_local_base_freq=20.0) == [20, 60]


def test_scale_caps_and_biases():
    model = config(query_pre_attn_scalar=64, final_logit_softcapping=20.0, attention_bias=True)
    attention = model.layers[0].attention
    assert (attention.softmax_scale, model.logit_soft_cap) == (1 / 8, 20)
    assert (attention.qkv_bias, attention.out_bias) == (True, True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method='awq'"),
        ({"hidden_activation": "quick_gelu"}, "activation 'quick_gelu' is not supported"),
    ],
)
def test_what_changes_the_result_is_never_ignored(settings, message):
    with pytest.raises(NotImplementedError, match=message):
        config(**settings)


def test_rotary_settings_of_one_kind_are_refused():
    with pytest.raises(ValueError, match="rope_parameters must have settings for full_attention and sliding_attention"):
        config(rope_parameters={"rope_type": "default", "rope_theta": 50.0})


def gguf_file(tmp_path, *tensors, **settings):
    values = {"attention.key_length": 4, "attention.value_length": 4, "attention.sliding_window": 8, **settings}
    writer = gguf_writer(tmp_path / "model.gguf", "gemma3", **values)
    for name, value in tensors:
        writer.add_tensor(name, value)
    finish(writer)
    return GGUFFile(tmp_path / "model.gguf")


def test_a_gguf_file(tmp_path):
    """llama.cpp takes windows in 5 of 6 layers, and scales positions in full attention alone."""
    source = gguf_file(tmp_path, block_count=6, **{"rope.scaling.type": "linear", "rope.scaling.factor": 8.0})
    model = read_config(source.config)
    assert [layer.attention.sliding_window for layer in model.layers] == [8] * 5 + [None]
    ropes = [(model.layers[i].attention.rope.theta, model.layers[i].attention.rope.factor) for i in (0, 5)]
    assert ropes == [(10_000, 1), (1000, 8)]
    assert (model.layers[0].attention.softmax_scale, model.tie_word_embeddings) == (1 / 2, True)


def test_the_gguf_file_of_the_largest_model_scales_by_the_hidden_size(tmp_path):
    """llama.cpp knows Gemma 3 27B by its 62 layers. Its scale is 168 ** -0.5: hidden size over heads."""
    sizes = {"attention.key_length": 8, "attention.value_length": 8, "rope.dimension_count": 8}
    model = read_config(gguf_file(tmp_path, block_count=62, **sizes).config)
    assert model.layers[0].attention.softmax_scale == (16 / 4) ** -0.5


def test_a_gguf_file_without_a_window_has_none(tmp_path):
    model = read_config(gguf_file(tmp_path, **{"attention.sliding_window": None}).config)
    assert [(layer.attention.sliding_window, layer.attention.rope.theta) for layer in model.layers] == [
        (None, 1000)
    ] * 2


def test_norms_of_a_gguf_file_are_stored_with_1_added(tmp_path):
    small = np.array([0.5, -0.25, 2**-9, 3], np.float32)
    names = ["attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm", "attn_q_norm", "attn_k_norm"]
    tensors = [(f"blk.0.{name}.weight", small + 1) for name in names] + [("output_norm.weight", small + 1)]
    source = gguf_file(tmp_path, *tensors, ("blk.0.attn_k.weight", np.ones((2, 2), np.float32)))
    norms = [name for name in source.shapes if "norm" in name]
    assert len(norms) == 7
    for name in norms:
        np.testing.assert_array_equal(source.weight(name), small)
    np.testing.assert_array_equal(source.weight("model.layers.0.self_attn.k_proj.weight"), np.ones((2, 2)))


def test_the_config_is_that_of_a_directory(tmp_path):
    given = read_config(gguf_file(tmp_path, **{"final_logit_softcapping": 20.0, "rope.freq_base_swa": 20.0}).config)
    settings = {"sliding_window": 8, "sliding_window_pattern": 6, "final_logit_softcapping": 20.0, "head_dim": 4}
    settings |= {"rope_local_base_freq": 20.0, "query_pre_attn_scalar": 4, "eos_token_id": None}
    same = config(**settings, tie_word_embeddings=True, rms_norm_eps=given.final_norm.eps)
    assert given == dataclasses.replace(same, end_token_ids=given.end_token_ids)
