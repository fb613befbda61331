import pytest

from paged_cache import CacheSpec, KVShape

LLAMA_3_8B = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
}
SLIDING, FULL = "sliding_attention", "full_attention"
ONE_LAYER = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}


def read(config, **changes):
    return CacheSpec.from_hf_config(config | changes)


def kinds(spec):
    return [(group.kind, group.tokens, len(group.layers)) for group in spec.groups]


def heads(spec):
    return [(shape.num_kv_heads, shape.head_dim) for shape in spec.shapes]


def test_llama():
    spec = read(LLAMA_3_8B)
    assert spec == CacheSpec.uniform(32, KVShape(num_kv_heads=8, head_dim=128))
    assert spec.assumed == ()


def test_llama_without_kv_heads_has_as_many_as_query_heads():
    spec = read({key: value for key, value in LLAMA_3_8B.items() if key != "num_key_value_heads"})
    assert (heads(spec), spec.assumed) == ([(32, 128)], ("num_key_value_heads=null",))


def test_null_counts_as_left_out():
    assert read(LLAMA_3_8B, head_dim=None, sliding_window=None, layer_types=None) == read(LLAMA_3_8B)


def test_gemma_3_says_what_its_file_leaves_out():
    config = {"text_config": {"model_type": "gemma3_text", "num_hidden_layers": 34, "sliding_window": 1024}}  # 4B
    spec = read(config)
    assert kinds(spec) == [("window", 1024, 29), ("full", 0, 5)]
    assert spec.groups[1].layers == (5, 11, 17, 23, 29)
    assert heads(spec) == [(4, 256)]
    assert spec.assumed == ("sliding_window_pattern=6", "num_key_value_heads=4", "head_dim=256")


def test_gemma_2_has_a_window_in_every_other_layer():
    config = {"model_type": "gemma2", "num_hidden_layers": 26, "num_key_value_heads": 4, "head_dim": 256}
    assert kinds(read(config, sliding_window=4096)) == [("window", 4096, 13), ("full", 0, 13)]


def test_gpt_oss_names_its_layers():
    config = {"num_hidden_layers": 24, "num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128}  # 20B
    spec = read(config, layer_types=["sliding_attention", "full_attention"] * 12)
    assert kinds(spec) == [("window", 128, 12), ("full", 0, 12)]
    assert spec.groups[0].layers == tuple(range(0, 24, 2))
    assert read({"model_type": "gpt_oss", "num_hidden_layers": 24}) == spec, "as transformers assumes them"


@pytest.mark.parametrize("no_rope_layers", [None, [], [1, 1, 1, 0] * 12])
def test_llama_4_sees_its_chunk_where_it_has_rotary_embedding(no_rope_layers):
    config = {"model_type": "llama4_text", "num_hidden_layers": 48, "num_key_value_heads": 8, "head_dim": 128}
    spec = read(config, attention_chunk_size=8192, no_rope_layers=no_rope_layers)
    assert kinds(spec) == [("chunked", 8192, 36), ("full", 0, 12)]
    assert spec.groups[1].layers == tuple(range(3, 48, 4))


def test_layer_types_name_chunks_too():
    config = ONE_LAYER | {"layer_types": ["chunked_attention"], "attention_chunk_size": 64}
    assert kinds(read(config)) == [("chunked", 64, 1)]


def test_deepseek_v3_keeps_one_latent_row():
    config = {"num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "v_head_dim": 128}
    spec = read(config, kv_lora_rank=512, qk_rope_head_dim=64)
    assert spec.shapes == (KVShape(num_kv_heads=1, head_dim=576, v_head_dim=512, latent=True),)


def test_mistral_has_its_window_in_every_layer_or_none():
    config = LLAMA_3_8B | {"model_type": "mistral"}
    assert kinds(read(config, sliding_window=4096)) == [("window", 4096, 32)]
    assert kinds(read(config, sliding_window=None)) == [("full", 0, 32)]


@pytest.mark.parametrize("named", [{"model_type": "mistral"}, {"architectures": ["MistralForCausalLM"]}])
def test_mistral_has_a_window_unless_the_file_says_null(named):
    config = {key: LLAMA_3_8B[key] for key in ("num_hidden_layers", "num_attention_heads", "hidden_size")} | named
    spec = read(config)
    assert (kinds(spec), heads(spec)) == ([("window", 4096, 32)], [(8, 128)])
    assert spec.assumed == ("sliding_window=4096", "num_key_value_heads=8")


def test_qwen_2_says_what_its_file_leaves_out():
    config = {"model_type": "qwen2", "num_hidden_layers": 30, "num_attention_heads": 32, "head_dim": 64}
    spec = read(config, sliding_window=8)
    assert (kinds(spec), heads(spec)) == ([("full", 0, 30)], [(32, 64)])
    assert kinds(read(config, sliding_window=8, use_sliding_window=True)) == [("full", 0, 28), ("window", 8, 2)]
    assert kinds(read(config, sliding_window=8, layer_types=[SLIDING] * 30)) == [("full", 0, 30)]


def test_qwen_has_its_window_where_it_says_so():
    config = LLAMA_3_8B | {"model_type": "qwen2", "sliding_window": 4096, "max_window_layers": 28}
    assert kinds(read(config, use_sliding_window=False)) == [("full", 0, 32)]
    spec = read(config, use_sliding_window=True)
    assert kinds(spec) == [("full", 0, 28), ("window", 4096, 4)]
    assert kinds(read(config, use_sliding_window=True, max_window_layers=0)) == [("window", 4096, 32)]


def test_layers_that_read_the_keys_of_others_keep_none():
    config = ONE_LAYER | {"num_hidden_layers": 5, "num_kv_shared_layers": 2, "sliding_window": 8}
    spec = read(config, layer_types=[SLIDING, FULL, SLIDING, FULL, SLIDING])
    assert [group.layers for group in spec.groups] == [(0, 2), (1,)]
    assert spec.shared_layers == ((3, 1), (4, 2))


def test_gemma_4_has_other_heads_where_it_sees_all():
    config = {"model_type": "gemma4_text", "num_hidden_layers": 12, "num_key_value_heads": 16, "head_dim": 256}
    config |= {"sliding_window": 1024, "num_global_key_value_heads": 4}
    spec = read(config, attention_k_eq_v=True)
    assert [(group.kind, group.layers[-1], group.kv.num_kv_heads, group.kv.head_dim) for group in spec.groups] == [
        ("window", 10, 16, 256),
        ("full", 11, 4, 512),
    ]
    assert spec.assumed == ("sliding_window_pattern=6", "global_head_dim=512")
    assert heads(read(config, attention_k_eq_v=False, global_head_dim=128)) == [(16, 256), (16, 128)]


@pytest.mark.parametrize("model_type", ["llama", "olmo2", "granite", "glm4", "cohere"])
def test_some_model_types_do_not_read_a_window(model_type):
    assert kinds(read(LLAMA_3_8B, model_type=model_type, sliding_window=8)) == [("full", 0, 32)]


@pytest.mark.parametrize("model_type", ["cohere2", "olmo3"])
def test_cohere_2_and_olmo_3_have_windows_in_three_of_four_layers(model_type):
    spec = read({"model_type": model_type, "num_hidden_layers": 8, "num_attention_heads": 4, "head_dim": 16})
    assert kinds(spec) == [("window", 4096, 6), ("full", 0, 2)]
    assert spec.groups[1].layers == (3, 7)


def test_smollm3_has_windows_where_it_has_no_rotary_embedding():
    config = {"model_type": "smollm3", "num_hidden_layers": 8, "head_dim": 16, "sliding_window": 8}
    assert kinds(read(config)) == [("full", 0, 8)]
    spec = read(config, use_sliding_window=True)
    assert kinds(spec) == [("full", 0, 6), ("window", 8, 2)]
    assert spec.groups[1].layers == (3, 7)


@pytest.mark.parametrize("key", ["layer_types", "layers_block_type"])
def test_a_granite_4_that_is_all_attention_keeps_keys_and_values(key):
    config = {"model_type": "granitemoehybrid", "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
    config |= {"mamba_d_state": 256}
    assert kinds(read(config, **{key: ["attention", "full_attention"]})) == [("full", 0, 2)]
    for mixed in (["attention", "mamba"], None):
        with pytest.raises(NotImplementedError, match="a model with mamba_d_state is not supported"):
            read(config, **{key: mixed})


def test_gpt2_has_keys_of_its_own():
    spec = read({"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768})
    assert (kinds(spec), heads(spec)) == ([("full", 0, 12)], [(12, 64)])


def test_gemma_4_sees_all_in_its_last_layer():
    config = {"model_type": "gemma4_text", "num_hidden_layers": 8}
    assert [group.layers for group in read(config).groups] == [(0, 1, 2, 3, 4, 6), (5, 7)]


def test_some_layers_have_other_heads():
    config = ONE_LAYER | {"num_hidden_layers": 12, "global_head_dim": 512}  # which per_layer_config replaces
    spec = read(config, per_layer_config={"05": {"head_dim": 128}, "11": {"head_dim": 32, "num_key_value_heads": 1}})
    assert [group.layers for group in spec.groups] == [(*range(5), *range(6, 11)), (5,), (11,)]
    assert heads(spec) == [(2, 64), (2, 128), (1, 32)]


def test_values_of_another_size():
    assert read(ONE_LAYER, v_head_dim=32).shapes[0].v_head_dim == 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": None}, "no num_hidden_layers; it must be a whole number of at least 1, so add it"),
        ({"num_attention_heads": None, "head_dim": None, "hidden_size": 64}, "has no num_attention_heads"),
        ({"head_dim": None}, "has no hidden_size"),
        ({"head_dim": None, "hidden_size": 6}, "hidden_size=6 is not divisible by num_attention_heads=4; add head_dim"),
        ({"head_dim": 0}, "head_dim=0 must be a whole number of at least 1"),
        ({"num_key_value_heads": [2]}, r"num_key_value_heads=\[2\] must be a whole number"),
        ({"num_key_value_heads": True}, "num_key_value_heads=True must be a whole number"),
        ({"layer_types": "full_attention"}, "layer_types='full_attention' must be a list with an entry for each of 1"),
        ({"layer_types": ["full_attention"] * 2}, "must be a list with an entry for each of 1 layers"),
        ({"layer_types": ["sliding_attention"]}, "has no sliding_window"),
        ({"layer_types": ["chunked_attention"]}, "has no attention_chunk_size"),
        ({"attention_chunk_size": 64}, "has no no_rope_layer_interval"),
        ({"sliding_window": 8}, "sliding_window=8, but which layers of model_type=None have it.*add layer_types"),
        ({"sliding_window": 8, "sliding_window_pattern": "LG"}, "sliding_window_pattern='LG' must be a whole number"),
        (
            {"sliding_window": 8, "model_type": "qwen3", "use_sliding_window": True, "max_window_layers": None},
            "has no max_window_layers",
        ),
        ({"kv_lora_rank": 512}, "has no qk_rope_head_dim"),
        (
            {"per_layer_config": {"01": {"head_dim": 8}}},
            r"per_layer_config has the key '01'; it must be a layer, in 0\.\.0",
        ),
        ({"per_layer_config": {"full_attention": {}}}, "per_layer_config has the key 'full_attention'"),
        ({"per_layer_config": {"0": 8}}, "0=8 must be an object of settings"),
        ({"per_layer_config": {"0": {"head_dim": 0}}}, "head_dim=0 must be a whole number of at least 1"),
        (
            {"model_type": "gemma4_text", "layer_types": [SLIDING], "sliding_window": 8},
            "layer_types of gemma4_text must end with full_attention, not window",
        ),
        ({"num_kv_shared_layers": 1}, "num_kv_shared_layers=1 must be less than num_hidden_layers=1"),
        (
            {"num_kv_shared_layers": 1, "num_hidden_layers": 2, "layer_types": [SLIDING, FULL], "sliding_window": 8},
            "num_kv_shared_layers=1, but none of the first 1 layers is of the kind 'full'",
        ),
    ],
)
def test_what_cannot_be_read_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        read(ONE_LAYER, **changes)


def test_missing_kv_heads_are_not_guessed():
    with pytest.raises(ValueError, match="has no num_key_value_heads"):
        CacheSpec.from_hf_config({key: value for key, value in ONE_LAYER.items() if key != "num_key_value_heads"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_encoder_decoder": True}, "a model with is_encoder_decoder is not supported: an encoder's keys"),
        ({"cross_attention_layers": [3]}, "cross_attention_layers is not supported: keys of pictures"),
        ({"mamba_d_state": 128}, "mamba_d_state is not supported: what layers keep that is no keys and values"),
        (
            {"per_layer_config": {"0": {"num_experts": 4}}},
            "per_layer_config has num_experts for layer 0; only head_dim",
        ),
        ({"layer_types": ["linear_attention"]}, "layer_types linear_attention are not supported"),
    ],
)
def test_caches_of_another_kind_are_refused(changes, message):
    with pytest.raises(NotImplementedError, match=message):
        read(ONE_LAYER, **changes)
