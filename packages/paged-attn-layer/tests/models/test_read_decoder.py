import pytest
from tiny_checkpoints import CONFIG

from paged_attn_layer import read_config


def config(**settings):
    return read_config({**CONFIG, **settings})


def attention(layer=0, **settings):
    return config(**settings).layers[layer].attention


def test_sizes_are_the_files():
    tiny = config()
    each = tiny.layers[0].attention
    assert (tiny.hidden_size, each.head_dim, each.num_kv_heads, each.rope.theta) == (16, 4, 2, 1000.0)
    assert (tiny.tie_word_embeddings, each.qkv_bias, tiny.layers[0].mlp.use_bias) == (False, False, False)
    assert attention(num_key_value_heads=None).num_kv_heads == 4
    assert attention(head_dim=8).head_dim == 8


def test_end_tokens_are_one_or_several():
    assert config().end_token_ids == config(eos_token_id=None).end_token_ids == frozenset()
    assert config(eos_token_id=2).end_token_ids == {2}
    assert config(eos_token_id=[2, 9]).end_token_ids == {2, 9}
    assert config(eos_token_id=[-1, 3]).end_token_ids == {3}, "-1 is how some checkpoints say that there is none"


def test_biases_by_family():
    assert attention(attention_bias=True).out_bias
    qwen = attention(architectures=["Qwen2ForCausalLM"])
    assert (qwen.qkv_bias, qwen.out_bias) == (True, False)


def windows(**settings):
    return [layer.attention.sliding_window for layer in config(**settings).layers]


def test_windows_by_family():
    assert windows(sliding_window=8) == [None, None]  # Llama does not read the key
    assert windows(architectures=["MistralForCausalLM"], sliding_window=8) == [8, 8]
    assert windows(architectures=["MistralForCausalLM"], sliding_window=None) == [None, None]
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8, "max_window_layers": 1}
    assert windows(**qwen) == [None, None]
    assert windows(**qwen, use_sliding_window=True) == [None, 8]
    kinds = ["sliding_attention", "full_attention"]
    assert windows(**qwen, use_sliding_window=True, layer_types=kinds) == [8, None]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architectures": ["BertModel"]}, "'BertModel' is not supported; supported are .*LlamaFor"),
        ({"architectures": None, "model_type": "bert"}, "architecture 'bert' is not supported"),
        ({"hidden_act": "quick_gelu"}, "activation 'quick_gelu' is not supported; silu, "),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_type='su'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method='awq'"),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["chunked_attention"] * 2,
                "attention_chunk_size": 8,
            },
            "layers with chunked attention are not supported",
        ),
    ],
)
def test_what_changes_the_result_is_never_ignored(settings, message):
    with pytest.raises(NotImplementedError, match=message):
        config(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": None}, "the config has no hidden_size; it must be a whole number of at least 1"),
        ({"num_key_value_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"head_dim": 5}, "head_dim=5 must be even"),
        ({"intermediate_size": 0}, "intermediate_size=0 must be a whole number of at least 1"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers='2' must be a whole number"),
    ],
)
def test_settings_that_mean_nothing(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architectures": "LlamaForCausalLM"}, r"architectures='LlamaForCausalLM' must be a list of names"),
        ({"hidden_size": "16"}, "hidden_size='16' must be a whole number of at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be a whole number of at least 1"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>' must be a token id or a list of token ids"),
        ({"eos_token_id": [1, 2.0]}, r"eos_token_id=\[1, 2.0\] must be a token id or a list of token ids"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True must be a whole number"),
        ({"rms_norm_eps": None}, "the config has no rms_norm_eps; it must be a finite number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan must be a finite number above 0"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps=inf must be a finite number above 0"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps=-1e-05 must be a finite number above 0"),
        ({"rms_norm_eps": 1e39}, r"eps=1e\+39 must be above 0 and finite, in float32"),
        ({"rms_norm_eps": 1e-50}, "eps=1e-50 must be above 0 and finite, in float32"),
        ({"rope_theta": None}, "the config has no rope_theta; it must be a finite number above 0"),
        (
            {"rope_scaling": {"rope_type": "longrope", "original_max_position_embeddings": None}},
            "no original_max_position_embeddings",
        ),
        ({"rms_norm_eps": "small"}, "rms_norm_eps='small' must be a finite number"),
        ({"rope_scaling": [2]}, r"rope_scaling=\[2\] must be an object of settings"),
        ({"quantization_config": "awq"}, "quantization_config='awq' must be an object of settings"),
    ],
)
def test_settings_of_the_wrong_kind_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)
