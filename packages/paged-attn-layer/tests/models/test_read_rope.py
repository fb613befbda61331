import numpy as np
import pytest
from tiny_checkpoints import CONFIG

from paged_attn_layer import RopeConfig, read_config
from paged_attn_layer._src.blocks.rope import rope_frequencies
from paged_attn_layer._src.models.read_rope import read_max_positions, read_rope
from paged_cache import HFConfig

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


LONGROPE = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 16,
    "short_factor": [1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [1, 2, 3, 4, 5, 6, 7, 8.5],
}
# Settings, the longest sequence, frequencies and attention factor: transformers 5.23 (ROPE_INIT_FUNCTIONS) for heads of
# 16, a base of 1000 and max_position_embeddings of 64.
HUGGING_FACE = {
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        None,
        [1.0, 0.26356032, 0.044456985, 0.018747354, 0.0079056947, 0.0033338037, 0.0014058533, 0.00059284345],
        1.138629436,
    ),
    "yarn-all": (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 4.0,
            "beta_slow": 0.5,
            "truncate": False,
            "mscale": 0.7,
            "mscale_all_dim": 0.4,
        },
        None,
        [1.0, 0.25393534, 0.044456985, 0.018747354, 0.0079056947, 0.0033338037, 0.0014058533, 0.00059284345],
        1.039403819,
    ),
    "yarn-None-factor": (
        {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16, "attention_factor": 1.5},
        None,
        [1.0, 0.26356032, 0.044456985, 0.018747354, 0.0079056947, 0.0033338037, 0.0014058533, 0.00059284345],
        1.5,
    ),
    "yarn-partial": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "partial_rotary_factor": 0.5},
        None,
        [1.0, 0.044456985, 0.0079056947, 0.0014058533],
        1.138629436,
    ),
    "longrope": (
        LONGROPE,
        None,
        [1.0, 0.38336048, 0.14818995, 0.057684168, 0.022587698, 0.0088901427, 0.003514633, 0.0013949256],
        1.224744871,
    ),
    "longrope-long": (
        LONGROPE,
        64,
        [1.0, 0.21084826, 0.059275981, 0.018747354, 0.0063245557, 0.0022225357, 0.00080334471, 0.00027898516],
        1.224744871,
    ),
    "dynamic": (
        {"rope_type": "dynamic", "factor": 2.0},
        None,
        [1.0, 0.42169651, 0.17782794, 0.074989416, 0.031622779, 0.013335215, 0.0056234132, 0.0023713738],
        1,
    ),
    "dynamic-long": (
        {"rope_type": "dynamic", "factor": 2.0},
        200,
        [1.0, 0.33275154, 0.11072361, 0.036843449, 0.012259715, 0.0040794397, 0.0013574398, 0.00045169026],
        1,
    ),
    "proportional": (
        {"rope_type": "proportional", "partial_rotary_factor": 0.5, "factor": 2.0},
        None,
        [0.5, 0.21084826, 0.08891397, 0.037494708, 0.0, 0.0, 0.0, 0.0],
        1,
    ),
    "linear-partial": (
        {"rope_type": "linear", "partial_rotary_factor": 0.5, "factor": 2.0},
        None,
        [0.5, 0.08891397, 0.015811389, 0.0028117066],
        1,
    ),
}


def config(**settings):
    return read_config({**CONFIG, **settings})


def rope(layer=0, **settings):
    return config(**settings).layers[layer].attention.rope


def test_both_spellings_of_rope():
    scaling = {**LLAMA3, "original_max_position_embeddings": 32}
    old = rope(rope_scaling=scaling)
    new = rope(rope_theta=None, rope_parameters={"rope_theta": 1000.0, **scaling})
    assert old == new
    assert (old.rope_type, old.factor, old.original_max_position) == ("llama3", 8.0, 32)
    assert rope(rope_scaling={"type": "linear", "factor": 2.0}).factor == 2.0


def test_the_first_trained_length_is_where_transformers_looks_for_it():
    """Beside `rope_scaling`, in it, or else the longest sequence."""
    inside = {**LLAMA3, "original_max_position_embeddings": 16}
    assert rope(rope_scaling=inside).original_max_position == 16
    assert rope(rope_scaling=LLAMA3, original_max_position_embeddings=32).original_max_position == 32
    assert rope(rope_scaling=inside, original_max_position_embeddings=32).original_max_position == 32
    assert rope(rope_scaling=LLAMA3).original_max_position == CONFIG["max_position_embeddings"]


def test_of_two_spellings_transformers_takes_the_old_one():
    both = rope(rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters={"factor": 3.0, "rope_theta": 5.0})
    assert (both.factor, both.theta) == (2.0, 1000.0)


def test_each_type_of_layer_has_its_own():
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}
    nested = {"full_attention": linear, "sliding_attention": {"rope_theta": 7.0}}
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True, "sliding_window": 8}
    qwen = {"architectures": ["Qwen2ForCausalLM"], **kinds}
    assert rope(0, **qwen, rope_parameters=nested) == RopeConfig(theta=7.0)
    assert rope(1, **qwen, rope_parameters=nested) == RopeConfig(theta=5.0, rope_type="linear", factor=2.0)
    assert rope(0, **qwen, rope_parameters={**nested, "sliding_attention": None}) is None
    with pytest.raises(ValueError, match="settings for full_attention; it must have them for sliding_attention too"):
        rope(0, **qwen, rope_parameters={"full_attention": linear})


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


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_frequencies_are_transformers(name):
    settings, longest, frequencies, attention_factor = HUGGING_FACE[name]
    keys = {"max_position_embeddings": 64, "rope_theta": 1000.0, "rope_parameters": settings, "max_positions": longest}
    made = read_rope(HFConfig.of(keys), 16, partial=True)
    np.testing.assert_allclose(rope_frequencies(16, made), frequencies, rtol=1e-6)
    assert made.attention_factor == pytest.approx(attention_factor, rel=1e-9)


def longest(rope, **settings):
    return read_max_positions(HFConfig.of({"max_position_embeddings": 64, "rope_parameters": rope, **settings}))


def test_the_longest_sequence_is_one_whose_frequencies_never_change():
    assert longest({}) == longest({"rope_type": "dynamic", "factor": 2.0}) == 64
    assert longest(LONGROPE) == 16
    assert longest({"full_attention": LONGROPE, "sliding_attention": None}) == 16
    assert longest(LONGROPE, max_positions=64) == 64
    assert longest({"rope_type": "dynamic", "factor": 2.0}, max_positions=200) == 200
    for rope in ({}, LONGROPE):
        with pytest.raises(ValueError, match="max_positions=65 must be at most max_position_embeddings=64"):
            longest(rope, max_positions=65)


def test_what_means_nothing_is_refused():
    with pytest.raises(ValueError, match=r"short_factor=\[1, '2'\] must be a list of numbers"):
        rope(rope_parameters={**LONGROPE, "short_factor": [1, "2"]})
    with pytest.raises(ValueError, match="freq_factors has 8 entries; it must have 2, one for each pair of 4 elements"):
        rope(rope_parameters=LONGROPE)
    with pytest.raises(NotImplementedError, match=r"partial_rotary_factor=0.5 is not supported for this family"):
        rope(rope_parameters={"partial_rotary_factor": 0.5})
