"""Requests that would poison every step are refused where they are made, by an error that names the argument."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import VOCABULARY, EveryKind

from paged_attn_layer import Engine, EngineConfig, Request
from paged_attn_layer._src.engine import checks


class Letters:
    eos_token_id = None
    chat_template = None

    def encode(self, text):
        return [ord(letter) - ord("A") for letter in text]

    def decode(self, token_ids, *, skip_special_tokens):
        return "".join(chr(ord("A") + i) for i in token_ids)


@pytest.fixture(scope="module")
def engine():
    config = EngineConfig(max_seqs=3, max_sequence_length=20, page_size=4, prefill_chunk=8)
    return Engine(EveryKind(), tokenizer=Letters(), config=config)


POISON = [
    ({"max_new_tokens": 2.5}, "max_new_tokens=2.5 must be a whole number of at least 1"),
    ({"max_new_tokens": 2.0}, "max_new_tokens=2.0 must be a whole number"),
    ({"max_new_tokens": True}, "max_new_tokens=True must be a whole number"),
    ({"max_new_tokens": float("nan")}, "max_new_tokens=nan must be a whole number"),
    ({"max_new_tokens": "3"}, "max_new_tokens='3' must be a whole number"),
    ({"max_new_tokens": -1}, "max_new_tokens=-1 must be at least 1"),
    ({"max_new_tokens": 10**30}, "must be at most max_sequence_length=20"),
    ({"namespace": None}, "namespace=None must be a str"),
    ({"namespace": 3}, "namespace=3 must be a str"),
    ({"namespace": b"a"}, "namespace=b'a' must be a str"),
    ({"namespace": "a\ud800"}, "namespace has half of a surrogate pair at character 1"),
    ({"stop": [3]}, "stop[0]=3 must be a str of at least one character"),
    ({"stop": ["A", ""]}, "stop[1]='' must be a str of at least one character"),
    ({"stop": b"A"}, "stop=b'A' must be a str or a list of them"),
    ({"stop": 3}, "stop=3 must be a str or a list of them"),
    ({"stop": "a\ud800"}, "stop[0] has half of a surrogate pair at character 1"),
    ({"stop": [None]}, "stop[0]=None must be a str of at least one character"),
    ({"stop_token_ids": [1.5]}, "token 0 of stop_token_ids is 1.5; it must be a whole number of at least 0"),
    ({"stop_token_ids": [True]}, "token 0 of stop_token_ids is True"),
    ({"stop_token_ids": [3, 40]}, "token 1 of stop_token_ids is 40; it must lie in 0..39"),
    ({"sampling": 0.7}, "sampling=0.7 must be SamplingParams"),
    ({"stop_token_ids": 3}, "stop_token_ids=3 must be a list of token ids"),
    ({"stop_token_ids": "3"}, "stop_token_ids='3' must be a list of token ids"),
    ({"chat": "no"}, "chat='no' must be True, False or None"),
    ({"prompt": [1, 2.0]}, "token 1 of the prompt is 2.0; it must lie in 0..39"),
    ({"prompt": [1, True]}, "token 1 of the prompt is True"),
    ({"prompt": [1, None]}, "token 1 of the prompt is None"),
    ({"prompt": [[1, 2]]}, "token 0 of the prompt is [1, 2]"),
    ({"prompt": np.array([[1, 2]])}, "token 0 of the prompt is array([1, 2])"),
    ({"prompt": [VOCABULARY]}, "token 0 of the prompt is 40; it must lie in 0..39"),
    ({"prompt": [2**70]}, "it must lie in 0..39"),
    ({"prompt": 7}, "the prompt=7 must be a list of token ids"),
    ({"prompt": {1, 2}}, "the prompt={1, 2} must be a list of token ids"),
    ({"prompt": b"AB"}, "the prompt=b'AB' must be a list of token ids"),
    ({"prompt": None}, "the prompt=None must be a list of token ids"),
    ({"prompt": "A\ud800"}, "prompt has half of a surrogate pair at character 1"),
    ({"prompt": "Az"}, "token 1 of the prompt is 57; it must lie in 0..39, the model's vocabulary; it comes from the"),
]


@pytest.mark.parametrize(("wrong", "says"), POISON)
def test_a_poison_request_is_refused_where_it_is_made(engine, wrong, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        engine.request(**{"prompt": [1, 2], "max_new_tokens": 2} | wrong)
    assert not engine.has_work


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"prompt_ids": [1.5]}, "token 0 of the prompt is 1.5"),
        ({"prompt_ids": [-1]}, "token 0 of the prompt is -1"),
        ({"namespace": None}, "namespace=None must be a str"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5 must be a whole number"),
        ({"stop_token_ids": [None]}, "token 0 of stop_token_ids is None"),
    ],
)
def test_a_request_made_by_hand_is_checked_too(wrong, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        Request(**{"prompt_ids": [1], "max_new_tokens": 2} | wrong)


def test_a_request_of_a_larger_engine_is_refused(engine):
    for add in (engine.add_request, lambda request: engine.serve([request])):
        with pytest.raises(ValueError, match="token 0 of the prompt is 40; it must lie in"):
            add(Request(prompt_ids=[VOCABULARY], max_new_tokens=1))
    assert not engine.has_work


@pytest.mark.parametrize(
    ("arrivals", "says"),
    [
        ([0, float("nan")], "arrivals[1]=nan must be a whole number of at least 0"),
        ([0, float("inf")], "arrivals[1]=inf must be a whole number"),
        ([0.5, 0], "arrivals[0]=0.5 must be a whole number"),
        ([0, True], "arrivals[1]=True must be a whole number"),
        ([0, None], "arrivals[1]=None must be a whole number"),
        ([0, -1], "arrivals[1]=-1 must be at least 0"),
        (3, "arrivals=3 must be a list of step numbers"),
        ([0], "arrivals has 1 entries; it must have 2"),
    ],
)
def test_arrivals_are_step_numbers(engine, arrivals, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        engine.generate([[1], [2]], max_new_tokens=1, arrivals=arrivals)
    assert not engine.has_work


def test_all_requests_are_checked_before_the_first_is_served(engine):
    good, steps = engine.request([1], max_new_tokens=1), len(engine.stats.steps)
    used = engine.request([2], max_new_tokens=1)
    engine.abort(used)
    with pytest.raises(ValueError, match=r"request=3 must be what Engine\.request gave"):
        engine.abort(3)
    for requests, says in (
        ([good, used], r"requests\[1\] was added before \(it is FINISHED\); make a new one"),
        ([good, good], "requests has one request twice"),
        ([good, [1, 2]], r"requests\[1\]=\[1, 2\] must be a Request; make it by Engine.request"),
    ):
        with pytest.raises(ValueError, match=says):
            engine.serve(requests)
    assert len(engine.stats.steps) == steps
    assert engine.serve([good])[0].finish_reason == "length"


def test_numbers_of_numpy_and_jax_are_whole_numbers(engine):
    prompt = np.array([1, 2], np.uint8)
    request = engine.request(prompt, max_new_tokens=np.int64(2), stop_token_ids={np.int32(3)}, stop={"Z"})
    assert [type(token) for token in request.prompt_ids] == [int, int]
    for again in (jnp.array([1, 2]), range(1, 3), (1, 2)):
        assert engine.request(again, max_new_tokens=1).prompt_ids == [1, 2]
    assert len(engine.generate([[1]], max_new_tokens=1, arrivals=np.array([2]))) == 1


def test_whole_number_returns_a_python_int():
    assert type(checks.whole_number("n", np.int8(4), 0)) is int


@pytest.mark.parametrize("prompts", [None, 3, {"A"}, {"A": 1}])
def test_prompts_have_an_order(engine, prompts):
    with pytest.raises(ValueError, match=re.escape(f"prompts={prompts!r} must be a list of prompts")):
        engine.generate(prompts)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"max_seqs": None}, "max_seqs=None must be a whole number of at least 1"),
        ({"max_seqs": "3"}, "max_seqs='3' must be a whole number"),
        ({"page_size": 4.0}, "page_size=4.0 must be a whole number"),
        ({"prefill_chunk": True}, "prefill_chunk=True must be a whole number"),
        ({"num_pages": float("nan")}, "num_pages=nan must be a whole number of at least 2"),
    ],
)
def test_sizes_of_an_engine_are_whole_numbers(wrong, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        EngineConfig(**wrong)


def test_a_type_of_pages_that_is_none():
    with pytest.raises(ValueError, match="dtype='int7' must be a type that pages can have"):
        Engine(EveryKind(), config=EngineConfig(max_sequence_length=20, kv_dtype="int7"))
