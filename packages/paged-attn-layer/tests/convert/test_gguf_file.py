import gguf
import numpy as np
import pytest
from tiny_checkpoints import CONFIG, finish, gguf_writer, random_weights, write_gguf

from paged_attn_layer import read_config
from paged_attn_layer._src.convert.gguf_file import GGUFFile
from paged_cache import HFConfig


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


def test_config_is_that_of_the_directory(path):
    write_gguf(path, random_weights())
    config = read_config(GGUFFile(path).config)
    assert config.final_norm.eps == pytest.approx(1e-5)
    assert config == read_config({**CONFIG, "rms_norm_eps": config.final_norm.eps})


def test_weights_are_in_hugging_faces_order(path):
    given = random_weights()
    write_gguf(path, given)
    source = GGUFFile(path)
    assert source.shapes == {name: weight.shape for name, weight in given.items()}
    for name, weight in given.items():
        np.testing.assert_array_equal(source.weight(name), weight)


def test_end_tokens(path):
    writer = gguf_writer(path)
    writer.add_eos_token_id(2)
    writer.add_uint32("tokenizer.ggml.eot_token_id", 7)
    writer.add_int32("tokenizer.ggml.eom_token_id", -1)
    finish(writer)
    assert read_config(GGUFFile(path).config).end_token_ids == {2, 7}


def test_end_tokens_of_a_file_that_names_no_end_of_turn(path):
    writer = gguf_writer(path)
    writer.add_eos_token_id(2)
    writer.add_token_list(["a", "<|im_end|>", "</s>"])
    finish(writer)
    assert read_config(GGUFFile(path).config).end_token_ids == {1, 2}


def test_without_an_output_matrix_the_embedding_is_tied(path):
    write_gguf(path, random_weights(tied=True))
    assert GGUFFile(path).config["tie_word_embeddings"] is True


def test_quantised_weights_are_dequantised(path):
    weight = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
    packed = gguf.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
    writer = gguf_writer(path)
    writer.add_tensor("token_embd.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    finish(writer)
    read = GGUFFile(path).weight("model.embed_tokens.weight")
    assert read.dtype == np.float32
    np.testing.assert_allclose(read, weight, atol=0.02)


def test_a_type_that_cannot_be_read_is_a_problem(path):
    writer = gguf_writer(path)
    kind = gguf.GGMLQuantizationType.Q8_K
    writer.add_tensor("token_embd.weight", np.zeros((1, 292), np.uint8), raw_dtype=kind)
    finish(writer)
    assert GGUFFile(path).problems == ["1 weights are stored as Q8_K, such as token_embd.weight; requantise the file"]


def test_only_files_of_the_llama_architecture_interleave_heads(path):
    given = random_weights()
    writer = gguf_writer(path, "qwen2")
    for layer in range(2):
        for part in "qk":
            name = f"model.layers.{layer}.self_attn.{part}_proj.weight"
            writer.add_tensor(f"blk.{layer}.attn_{part}.weight", given[name])
    finish(writer)
    source = GGUFFile(path)
    assert source.config["architectures"] == ["Qwen2ForCausalLM"]
    for name in source.shapes:
        np.testing.assert_array_equal(source.weight(name), given[name])


def test_a_tensor_that_no_rule_names_keeps_its_name(path):
    finish(writer_with(path, "other.weight"))
    source = GGUFFile(path)
    assert source.shapes == {"other.weight": (2,)}
    np.testing.assert_array_equal(source.weight("other.weight"), [1, 1])


def writer_with(path, name):
    writer = gguf_writer(path)
    writer.add_tensor(name, np.ones(2, np.float32))
    return writer


def test_tensors_say_which_biases_there_are(path):
    finish(writer_with(path, "blk.0.ffn_up.bias"))
    config = GGUFFile(path).config
    assert (config["mlp_bias"], config["attention_bias"]) == (True, False)


def test_linear_rope_scaling(path):
    writer = gguf_writer(path, **{"rope.scaling.type": "linear"})
    writer.add_float32("llama.rope.scaling.factor", 4.0)
    finish(writer)
    rope = read_config(GGUFFile(path).config).layers[0].attention.rope
    assert (rope.rope_type, rope.factor) == ("linear", 4.0)


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
def test_a_scaling_without_type_is_linear(path, key):
    writer = gguf_writer(path)
    writer.add_float32(f"llama.{key}", 4.0)
    finish(writer)
    rope = read_config(GGUFFile(path).config).layers[0].attention.rope
    assert (rope.rope_type, rope.factor) == ("linear", 4.0)


def test_no_scaling_has_no_factor(path):
    writer = gguf_writer(path, **{"rope.scaling.type": "none"})
    writer.add_float32("llama.rope.scaling.factor", 4.0)
    finish(writer)
    assert read_config(GGUFFile(path).config).layers[0].attention.rope.rope_type == "default"


def test_divisors_of_the_frequencies(path):
    writer = gguf_writer(path)
    writer.add_tensor("rope_freqs.weight", np.array([1, 8], np.float32))
    finish(writer)
    source = GGUFFile(path)
    assert read_config(source.config).layers[0].attention.rope.freq_factors == (1.0, 8.0)
    assert source.shapes == {}


@pytest.mark.parametrize(
    ("divisors", "message"),
    [([1, 8, 8], "freq_factors has 3 entries; it must have 2"), ([1, np.nan], r"freq_factors\[1\]=nan must be pos")],
)
def test_divisors_that_mean_nothing(path, divisors, message):
    writer = gguf_writer(path)
    writer.add_tensor("rope_freqs.weight", np.array(divisors, np.float32))
    finish(writer)
    with pytest.raises(ValueError, match=message):
        read_config(GGUFFile(path).config)


def test_settings_that_change_nothing(path):
    settings = {"rope.scaling.type": "linear", "rope.scaling.original_context_length": 32, "expert_used_count": 0}
    writer = gguf_writer(path, **settings, **{"rope.scaling.finetuned": True, "attention.causal": True})
    writer.add_float32("llama.rope.scaling.factor", 2.0)
    finish(writer)
    assert read_config(GGUFFile(path).config).layers[0].attention.rope.factor == 2.0


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("gemma", {}, "GGUF architecture 'gemma' is not supported; supported are .*llama, .*qwen2"),
        ("llama", {"expert_count": 8}, "expert_count=8 is not supported; it must be 0"),
        ("llama", {"expert_used_count": 2}, "expert_used_count=2 is not supported; it must be 0"),
        ("llama", {"attention.causal": False}, "attention.causal=False is not supported; it must be True"),
        ("llama", {"rope.dimension_count": 2}, "rope.dimension_count=2 is not supported; it must be the head size, 4"),
        ("llama", {"logit_scale": 2}, "settings of llama that are not supported: logit_scale"),
        ("llama", {"attention.head_count_kv": [2, 1]}, "differ by layer are not supported: attention.head_count_kv"),
    ],
)
def test_what_changes_the_result_is_never_ignored(path, architecture, settings, message):
    finish(gguf_writer(path, architecture, **settings))
    with pytest.raises(NotImplementedError, match=message):
        GGUFFile(path)


def test_a_file_without_sizes(path):
    finish(gguf_writer(path, **{"attention.head_count": None}))
    with pytest.raises(ValueError, match=r"has no attention.head_count or embedding_length above 0; download it again"):
        GGUFFile(path)


def test_a_file_without_epsilon(path):
    finish(gguf_writer(path, **{"attention.layer_norm_rms_epsilon": None}))
    with pytest.raises(ValueError, match=r"has no attention.layer_norm_rms_epsilon; download it again"):
        GGUFFile(path)


@pytest.mark.parametrize("keep", [0, 7, 300, -64])
def test_a_file_cut_short(path, keep):
    write_gguf(path, random_weights())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"is not a readable GGUF file .*; download it again"):
        GGUFFile(path)


def test_no_file(path):
    with pytest.raises(ValueError, match=r"model.gguf is missing"):
        GGUFFile(path)


def test_yarn_is_scaled_from_the_length_that_the_model_was_trained_for(path):
    writer = gguf_writer(path, **{"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 16})
    writer.add_float32("llama.rope.scaling.factor", 4.0)
    write_gguf(path, random_weights(), writer)
    rope = read_config(GGUFFile(path).config).layers[0].attention.rope
    assert (rope.rope_type, rope.factor, rope.original_max_position) == ("yarn", 4.0, 16)


def test_granites_factors_are_in_its_settings(path):
    scales = {"attention.scale": 0.25, "embedding_scale": 12.0, "residual_scale": 0.5, "logit_scale": 8.0}
    finish(gguf_writer(path, "granite", **scales))
    config = read_config(GGUFFile(path).config)
    attention = config.layers[0].attention
    assert (attention.softmax_scale, config.embed_scale, config.logit_scale) == (0.25, 12.0, 0.125)
    assert config.layers[0].residual_multiplier == 0.5


def test_every_fourth_layer_of_smollm3_has_no_rotary_embedding(path):
    """The file does not say so."""
    finish(gguf_writer(path, "smollm3", block_count=5))
    layers = read_config(GGUFFile(path).config).layers
    assert [layer.attention.rope is not None for layer in layers] == [True, True, True, False, True]


def test_a_file_of_olmo_2_with_windows_is_refused(path):
    """llama.cpp writes OLMo 3 so."""
    finish(gguf_writer(path, "olmo2", **{"attention.sliding_window": 8}))
    with pytest.raises(NotImplementedError, match=r"of olmo2 that are not supported: attention.sliding_window"):
        GGUFFile(path)


@pytest.mark.parametrize("architecture", ["qwen3", "granite", "smollm3", "olmo2"])
def test_files_of_an_architecture_are_read_as_its_family(path, architecture):
    writer = gguf_writer(path, architecture)
    writer.add_tensor("blk.0.attn_q.bias", np.zeros(16, np.float32))
    finish(writer)
    config = GGUFFile(path).config
    assert config["attention_bias"] is True
    assert HFConfig.of(config).model_type == architecture
