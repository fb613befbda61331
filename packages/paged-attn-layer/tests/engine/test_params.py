import re

import pytest

from paged_attn_layer import SamplingParams
from paged_attn_layer._src.engine.params import MAX_BIASED_TOKENS, params_of

WRONG = [
    ({"temperature": -0.1}, "temperature=-0.1 must be a number in 0..1e+06"),
    ({"temperature": float("nan")}, "temperature=nan must be a number"),
    ({"temperature": "1"}, "temperature='1' must be a number"),
    ({"temperature": True}, "temperature=True must be a number"),
    ({"top_k": 1.5}, "top_k=1.5 must be a whole number"),
    ({"top_k": -1}, "top_k=-1 must be at least 0"),
    ({"top_p": 0}, "top_p=0.0 must be above 0"),
    ({"top_p": 1.1}, "top_p=1.1 must be a number in 0..1"),
    ({"min_p": 2}, "min_p=2 must be a number in 0..1"),
    ({"repetition_penalty": 0}, "repetition_penalty=0.0 must be above 0"),
    ({"presence_penalty": 3}, "presence_penalty=3 must be a number in -2..2"),
    ({"frequency_penalty": -3}, "frequency_penalty=-3 must be a number in -2..2"),
    ({"logit_bias": [3]}, "logit_bias=[3] must be a dict"),
    ({"logit_bias": {-1: 2}}, "token 0 of logit_bias is -1"),
    ({"logit_bias": {1: 101}}, "logit_bias[1]=101 must be a number in -100..100"),
    ({"logit_bias": dict.fromkeys(range(MAX_BIASED_TOKENS + 1), 1)}, "logit_bias has 321 tokens; it must have at most"),
    ({"seed": -1}, "seed=-1 must be at least 0"),
    ({"seed": 2**32}, "seed=4294967296 must be below 2**32"),
    ({"max_new_tokens": None}, "max_new_tokens=None must be a whole number"),
    ({"min_new_tokens": 65}, "min_new_tokens=65 must be at most max_new_tokens=64"),
    ({"stop": None}, "stop=None must be a str or a list of them"),
    ({"stop_token_ids": [1.5]}, "token 0 of stop_token_ids is 1.5"),
    ({"ignore_end_tokens": "no"}, "ignore_end_tokens='no' must be True or False"),
]


@pytest.mark.parametrize(("wrong", "says"), WRONG)
def test_each_error_names_the_field(wrong, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        SamplingParams(**wrong)


def test_the_default_is_greedy_and_adjusts_nothing():
    assert SamplingParams().is_greedy
    assert not SamplingParams().adjusts
    for adjusting in ({"logit_bias": {3: 1}}, {"min_new_tokens": 1}, {"presence_penalty": 1}):
        assert SamplingParams(**adjusting).adjusts


def test_a_seed_is_drawn_once():
    drawn = SamplingParams().seeded()
    assert drawn.seed is not None
    assert drawn.seeded() == drawn
    assert SamplingParams().seeded() != drawn


def test_a_field_is_given_in_one_place():
    assert params_of(None, 3, "a", [1], True) == SamplingParams(
        max_new_tokens=3, stop="a", stop_token_ids=[1], ignore_end_tokens=True
    )
    assert params_of(SamplingParams(top_k=3), None, None, None, None) == SamplingParams(top_k=3)
    with pytest.raises(ValueError, match="stop='a' is given beside sampling; give it there"):
        params_of(SamplingParams(), None, "a", None, None)
    with pytest.raises(ValueError, match=r"sampling=0\.7 must be SamplingParams"):
        params_of(0.7, None, None, None, None)
