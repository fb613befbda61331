import pytest
from tiny_checkpoints import CONFIG

from paged_attn_layer import DecoderConfig, read_config

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def config(**settings):
    return read_config({**CONFIG, **settings})


def test_sizes_are_the_files():
    tiny = config()
    assert (tiny.hidden_size, tiny.head_dim, tiny.num_key_value_heads, tiny.rope.theta) == (16, 4, 2, 1000.0)
    assert (tiny.tie_word_embeddings, tiny.qkv_bias, tiny.mlp_bias) == (False, False, False)
    assert config(num_key_value_heads=None).num_key_value_heads == 4
    assert config(head_dim=8).head_dim == 8


def test_both_spellings_of_rope():
    scaling = {**LLAMA3, "original_max_position_embeddings": 32}
    old = config(rope_scaling=scaling)
    new = config(rope_theta=None, rope_parameters={"rope_theta": 1000.0, **scaling})
    assert old.rope == new.rope
    assert (old.rope.rope_type, old.rope.factor, old.rope.original_max_position) == ("llama3", 8.0, 32)
    assert config(rope_scaling={"type": "linear", "factor": 2.0}).rope.factor == 2.0


def test_the_first_trained_length_is_where_transformers_looks_for_it():
    """Beside `rope_scaling`, in it, or else the longest sequence."""
    inside = {**LLAMA3, "original_max_position_embeddings": 16}
    assert config(rope_scaling=inside).rope.original_max_position == 16
    assert config(rope_scaling=LLAMA3, original_max_position_embeddings=32).rope.original_max_position == 32
    assert config(rope_scaling=inside, original_max_position_embeddings=32).rope.original_max_position == 32
    assert config(rope_scaling=LLAMA3).rope.original_max_position == CONFIG["max_position_embeddings"]


def test_of_two_spellings_transformers_takes_the_old_one():
    both = config(rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters={"factor": 3.0, "rope_theta": 5.0})
    assert (both.rope.factor, both.rope.theta) == (2.0, 1000.0)


def test_rope_by_type_of_layer():
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}
    nested = config(rope_parameters={"full_attention": linear, "sliding_attention": linear}).rope
    assert (nested.rope_type, nested.factor, nested.theta) == ("linear", 2.0, 5.0)
    for other in ({**linear, "factor": 3.0}, None):
        with pytest.raises(NotImplementedError, match=r"rope_parameters=.* it must be the same for all layers"):
            config(rope_parameters={"full_attention": linear, "sliding_attention": other})


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_no_number_of_rope_is_made_up(kind):
    """transformers 5.23 refuses each of these."""
    full = {**LLAMA3, "rope_type": kind, "rope_theta": 1000.0, "original_max_position_embeddings": 32}
    needed = {"linear": ["factor"], "llama3": ["factor", "low_freq_factor", "high_freq_factor"]}[kind]
    for key in needed:
        with pytest.raises(ValueError, match=f"the config has no {key}; it must be a finite number above 0"):
            config(rope_scaling={name: value for name, value in full.items() if name != key})
        with pytest.raises(ValueError, match=f"the config has no {key}"):
            config(rope_scaling={**full, key: None})
        with pytest.raises(ValueError, match=f"{key}='4.0' must be a finite number above 0"):
            config(rope_scaling={**full, key: "4.0"})


def test_end_tokens_are_one_or_several():
    assert config().end_token_ids == config(eos_token_id=None).end_token_ids == frozenset()
    assert config(eos_token_id=2).end_token_ids == {2}
    assert config(eos_token_id=[2, 9]).end_token_ids == {2, 9}
    assert config(eos_token_id=[-1, 3]).end_token_ids == {3}, "-1 is how some checkpoints say that there is none"


def test_biases_by_family():
    assert config(attention_bias=True).o_bias
    qwen = config(architectures=["Qwen2ForCausalLM"])
    assert (qwen.qkv_bias, qwen.o_bias) == (True, False)


def test_windows_by_family():
    assert config(sliding_window=8).sliding_window(0) is None  # Llama does not read the key
    mistral = config(architectures=["MistralForCausalLM"], sliding_window=8)
    assert [mistral.sliding_window(layer) for layer in range(2)] == [8, 8]
    assert config(architectures=["MistralForCausalLM"], sliding_window=None).sliding_windows == ()
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8, "max_window_layers": 1}
    assert config(**qwen).sliding_windows == ()
    assert config(**qwen, use_sliding_window=True).sliding_windows == (None, 8)
    kinds = ["sliding_attention", "full_attention"]
    assert config(**qwen, use_sliding_window=True, layer_types=kinds).sliding_windows == (8, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "'MixtralForCausalLM' is not supported; supported are LlamaFor"),
        ({"architectures": None, "model_type": "bert"}, "architecture 'bert' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type='yarn'"),
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
        ({"num_key_value_heads": 3}, "num_attention_heads=4 must be a multiple of num_key_value_heads=3"),
        ({"head_dim": 5}, "head_dim=5 must be even"),
        ({"intermediate_size": 0}, "intermediate_size=0 must be a whole number of at least 1"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers='2' must be a whole number"),
    ],
)
def test_settings_that_mean_nothing(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_one_window_a_layer():
    with pytest.raises(ValueError, match="sliding_windows has 1 entries"):
        DecoderConfig(**{**vars(config()), "sliding_windows": (8,)})


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
        ({"rms_norm_eps": 1e39}, r"rms_norm_eps=1e\+39 must be above 0 and finite, in float32"),
        ({"rms_norm_eps": 1e-50}, "rms_norm_eps=1e-50 must be above 0 and finite, in float32"),
        ({"rope_theta": None}, "the config has no rope_theta; it must be a finite number above 0"),
        ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": None}}, "no original_max_position_embeddings"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps='small' must be a finite number"),
        ({"rope_scaling": [2]}, r"rope_scaling=\[2\] must be an object of settings"),
        ({"quantization_config": "awq"}, "quantization_config='awq' must be an object of settings"),
    ],
)
def test_settings_of_the_wrong_kind_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)
