import numpy as np
import pytest
from flax import nnx
from tiny_checkpoints import CONFIG

from paged_attn_layer import Decoder, load_model, read_config, save_model
from paged_attn_layer._src.convert.hf_directory import HFDirectory

SIZES = {"hidden_size_per_layer_input": 2, "vocab_size_per_layer_input": 32, "global_head_dim": 8, "head_dim": 4}
SIZES |= {"sliding_window": 8, "sliding_window_pattern": 2, "num_hidden_layers": 4}
GEMMA_4_E2B = {
    "architectures": ["Gemma4ForConditionalGeneration"],
    "model_type": "gemma4",
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "gemma4_text",
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "num_hidden_layers": 35,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 20,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
        "use_double_wide_mlp": True,
        "final_logit_softcapping": 30.0,
    },
}
"""The kind of config.json that google/gemma-4-E2B has."""


def settings(**changes):
    return {**CONFIG, "architectures": ["Gemma4ForCausalLM"], **SIZES, **changes}


def test_the_text_of_a_model_that_sees_and_hears():
    model = read_config(GEMMA_4_E2B)
    windowed, full = model.layers[0].attention, model.layers[4].attention
    assert (windowed.head_dim, windowed.sliding_window, windowed.softmax_scale) == (256, 512, 1)
    assert (full.head_dim, full.sliding_window, full.rope.rope_type, full.rope.rotary_dim) == (
        *(512, None, "proportional", 128),
    )
    assert (windowed.rope.theta, full.rope.theta) == (10_000, 1_000_000)
    assert model.shared_layers[0] == (15, 13)
    assert model.shared_layers[4] == (19, 14)
    assert (model.layers[14].mlp.intermediate_size, model.layers[15].mlp.intermediate_size) == (6144, 12288)
    assert (model.per_layer_input.size, model.per_layer_vocab_size) == (256, 262144)
    assert (model.embed_scale, model.logit_soft_cap) == (1536**0.5, 30)
    assert (windowed.v_norm.use_scale, windowed.qk_norm.use_scale, windowed.qk_norm.offset) == (False, True, 0)


def test_values_are_keys_in_full_attention_alone():
    model = read_config(settings(attention_k_eq_v=True, num_global_key_value_heads=1))
    attentions = [layer.attention for layer in model.layers[:2]]
    assert [(each.values_are_keys, each.num_kv_heads) for each in attentions] == [(False, 2), (True, 1)]


def test_experts_beside_the_mlp():
    sizes = {"num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 6}
    moe = read_config(settings(enable_moe_block=True, **sizes)).layers[0].mlp
    assert (moe.router.num_experts, moe.router.experts_per_token, moe.router.logit_scale) == (5, 2, 1 / 4)
    assert (moe.router.renormalise, moe.router.use_expert_scale) == (True, True)
    assert (moe.expert.intermediate_size, moe.shared.intermediate_size, moe.norm, moe.router.norm) == (
        *(6, 24, moe.norm, moe.norm),
    )


@pytest.mark.parametrize("size", [0, None])
def test_no_inputs_of_layers(size):
    model = read_config(settings(hidden_size_per_layer_input=size))
    assert (model.per_layer_input, model.per_layer_vocab_size) == (None, None)


def test_only_pictures_see_later_tokens():
    assert read_config(settings(use_bidirectional_attention="vision")) == read_config(settings())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_bidirectional_attention": "all"}, 'use_bidirectional_attention="all" is not supported'),
        ({"hidden_activation": "quick_gelu"}, "activation 'quick_gelu' is not supported"),
        ({"rope_parameters": {"sliding_attention": {"partial_rotary_factor": 0.5}}}, "partial_rotary_factor=0.5"),
    ],
)
def test_what_changes_the_result_is_never_ignored(changes, message):
    with pytest.raises(NotImplementedError, match=message):
        read_config(settings(**changes))


def test_projections_to_keys_that_no_layer_reads_are_left_out(tmp_path):
    config = settings(num_kv_shared_layers=1, num_hidden_layers=2, layer_types=["full_attention"] * 2)
    save_model(_random(config), tmp_path / "model", config=config)
    source = HFDirectory(tmp_path / "model")
    weights = {name: source.weight(name).read() for name in source.shapes}
    more = {f"model.layers.1.self_attn.{part}.weight": np.ones(8) for part in ("k_proj", "v_proj", "k_norm")}
    assert not more.keys() & weights.keys()
    model = load_model({**weights, **more}, config=config)
    np.testing.assert_array_equal(model.layers[1].scalar[...], weights["model.layers.1.layer_scalar"])


def _random(config):
    return Decoder(read_config(config), rngs=nnx.Rngs(0))
