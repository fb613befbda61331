import pytest

from paged_cache import HFConfig


def test_a_getter_gives_the_files_value_as_what_it_must_be():
    config = HFConfig.of({"a": 3, "b": 1, "c": False, "d": "silu", "e": {"f": 2}, "num_hidden_layers": 2, "g": [1, 0]})
    assert (config.whole("a"), config.whole("a", 7), config.flag("c"), config.text("d")) == (3, 3, False, "silu")
    assert (config.number("b"), type(config.number("b"))) == (1.0, float)
    assert (config.mapping("e"), config.per_layer("g")) == ({"f": 2}, [1, 0])


def test_a_default_stands_in_for_a_key_that_is_left_out_or_null():
    config = HFConfig.of({"a": None})
    for key in ("a", "b"):
        assert not config.has(key)
        assert (config.whole(key, 4), config.number(key, 0.5), config.flag(key, False)) == (4, 0.5, False)
        assert (config.text(key, "x"), config.mapping(key), config.get(key)) == ("x", {}, None)
    assert (config.says("a"), config.says("b"), config.assumed) == (True, False, ())


@pytest.mark.parametrize("key", ["a", "b"])
def test_without_a_default_that_is_an_error_that_says_what_it_must_be(key):
    config = HFConfig.of({"a": None, "num_hidden_layers": 2})
    for getter, must in (
        (config.whole, "a whole number of at least 1"),
        (config.number, "a finite number above 0"),
        (config.flag, "true or false"),
        (config.text, "a text"),
        (config.per_layer, "a list with an entry for each of 2 layers"),
    ):
        with pytest.raises(ValueError, match=f"the config has no {key}; it must be {must}, so add it"):
            getter(key)


@pytest.mark.parametrize(
    ("getter", "value", "message"),
    [
        ("whole", "3", "key='3' must be a whole number of at least 1"),
        ("whole", True, "key=True must be a whole number"),
        ("whole", 0, "key=0 must be a whole number of at least 1"),
        ("whole", 2.0, r"key=2\.0 must be a whole number"),
        ("number", "small", "key='small' must be a finite number above 0"),
        ("number", 0, "key=0 must be a finite number above 0"),
        ("number", float("inf"), "key=inf must be a finite number above 0"),
        ("number", 10**400, "0 must be a finite number above 0"),
        ("number", float("nan"), "key=nan must be a finite number above 0"),
        ("number", True, "key=True must be a finite number"),
        ("flag", 1, "key=1 must be true or false"),
        ("text", ["silu"], r"key=\['silu'\] must be a text"),
        ("per_layer", "ab", "key='ab' must be a list with an entry for each of 2 layers"),
        ("per_layer", [1], r"key=\[1\] must be a list with an entry for each of 2 layers"),
        ("mapping", [2], r"key=\[2\] must be an object of settings"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(getter, value, message):
    with pytest.raises(ValueError, match=message):
        getattr(HFConfig.of({"key": value, "num_hidden_layers": 2}), getter)("key")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], r"the config=\[\] must be an object of settings"),
        ({"text_config": 3}, "text_config=3 must be an object of settings"),
        (
            {"architectures": "LlamaForCausalLM"},
            r"architectures='LlamaForCausalLM' must be a list of names, such as \[",
        ),
        ({"architectures": [3]}, r"architectures=\[3\] must be a list of names"),
        ({"model_type": 3}, "model_type=3 must be a text"),
    ],
)
def test_a_file_that_is_no_config_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        HFConfig.of(config)


def test_what_the_model_type_has_stands_in_for_what_the_file_leaves_out():
    config = HFConfig.of({"model_type": "mistral", "hidden_size": 64})
    assert (config.whole("sliding_window"), config.whole("num_key_value_heads"), config.whole("hidden_size")) == (
        *(4096, 8, 64),
    )
    assert config.assumed == ("sliding_window=4096", "num_key_value_heads=8")


@pytest.mark.parametrize("inner", [{}, {"tie_word_embeddings": True, "quantization_config": None}])
def test_keys_of_the_whole_model_count_beside_a_nested_text_config(inner):
    whole = {"tie_word_embeddings": False, "quantization_config": {"quant_method": "awq"}, "hidden_size": 8}
    config = HFConfig.of({**whole, "text_config": {"model_type": "gemma3_text", **inner}})
    assert (config.flag("tie_word_embeddings"), config.mapping("quantization_config")) == (
        *(False, {"quant_method": "awq"}),
    )
    assert config.whole("hidden_size") == 2304  # of the text alone


def test_null_is_no_value_whatever_the_model_type_has():
    config = HFConfig.of({"model_type": "mistral", "sliding_window": None})
    assert (config.has("sliding_window"), config.assumed) == (False, ())


def test_the_callers_defaults_go_before_those_of_the_model_type():
    config = HFConfig.of({"model_type": "qwen2", "vocab_size": 8}, defaults={"max_window_layers": 1, "vocab_size": 9})
    assert (config.whole("max_window_layers"), config.flag("use_sliding_window"), config.whole("vocab_size")) == (
        *(1, False, 8),
    )


def test_keys_that_a_model_type_names_otherwise_have_the_common_names():
    config = HFConfig.of({"model_type": "gpt2", "n_embd": 768, "n_inner": None, "hidden_act": "relu"})
    assert (config.whole("hidden_size"), config.has("intermediate_size"), config.text("hidden_act")) == (
        *(768, False, "relu"),
    )
    assert HFConfig.of({"model_type": "llama", "n_embd": 768}).get("hidden_size") is None
    kimi_k2 = {"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"], "n_routed_experts": 384}
    assert HFConfig.of(kimi_k2).whole("num_local_experts") == 384


def test_replaced_values_go_before_those_of_the_file_and_the_model_type():
    config = HFConfig.of({"model_type": "mistral", "head_dim": 64, "hidden_size": 8})
    other = config.replace({"head_dim": 32, "sliding_window": None})
    assert (other.whole("head_dim"), other.has("sliding_window"), other.whole("hidden_size")) == (32, False, 8)
    assert (other.architecture, other.model_type) == ("MistralForCausalLM", "mistral")
    assert config.whole("head_dim") == 64


def test_layers_with_rotary_embedding_are_listed_or_follow_from_an_interval():
    config = {"model_type": "smollm3", "num_hidden_layers": 5}
    assert HFConfig.of(config).layers_with_rope() == [True, True, True, False, True]
    assert HFConfig.of(config | {"no_rope_layers": [0, 1, 1, 0, 1]}).layers_with_rope() == [
        False,
        True,
        True,
        False,
        True,
    ]
    with pytest.raises(ValueError, match=r"no_rope_layers=\[1\] must be a list with an entry for each of 5 layers"):
        HFConfig.of(config | {"no_rope_layers": [1]}).layers_with_rope()


@pytest.mark.parametrize(
    ("config", "architecture", "model_type"),
    [
        ({"model_type": "llama"}, "LlamaForCausalLM", "llama"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM", "qwen2"),
        ({"architectures": ["Qwen2ForCausalLM"], "model_type": None}, "Qwen2ForCausalLM", "qwen2"),
        ({"architectures": [], "model_type": "mistral"}, "MistralForCausalLM", "mistral"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "other"}, "LlamaForCausalLM", "llama"),
        ({"architectures": ["OtherForCausalLM"], "model_type": "other"}, "OtherForCausalLM", "other"),
        ({"architectures": ["NewModel"]}, "NewModel", None),
        ({"model_type": "new"}, None, "new"),
        ({}, None, None),
        (
            {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {"model_type": "gemma3_text"}},
            "Gemma3ForConditionalGeneration",
            "gemma3_text",
        ),
        ({"model_type": "llava", "text_config": {"architectures": ["LlamaForCausalLM"]}}, "LlamaForCausalLM", "llama"),
    ],
)
def test_architecture_and_model_type_follow_from_each_other(config, architecture, model_type):
    read = HFConfig.of(config)
    assert (read.architecture, read.model_type) == (architecture, model_type)


@pytest.mark.parametrize("number", [2**63, 10**400])
def test_numbers_that_no_size_is(number):
    with pytest.raises(ValueError, match=f"vocab_size has {number.bit_length()} bits; it must be a whole number"):
        HFConfig({"vocab_size": number}).whole("vocab_size")
