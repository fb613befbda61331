import pytest

from paged_attn_layer._src.engine.request import Request
from paged_attn_layer._src.engine.text import OutputText


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="the prompt is empty; it must have at least one token"):
        Request(prompt_ids=[], max_new_tokens=3)


def test_no_new_tokens_are_refused():
    with pytest.raises(ValueError, match="max_new_tokens=0 must be at least 1"):
        Request(prompt_ids=[1], max_new_tokens=0)


def test_the_answer_ends_at_its_length():
    request = Request(prompt_ids=[7, 8], max_new_tokens=2)
    assert [request.append(1), request.append(2)] == [None, "length"]
    assert (request.token_ids, request.output_ids, request.prompt_ids) == ([7, 8, 1, 2], [1, 2], [7, 8])


def test_a_stop_token_ends_the_answer_and_is_no_text():
    request = Request(prompt_ids=[7], max_new_tokens=9, stop_token_ids={3}, text=OutputText(str))
    assert [request.append(1), request.append(3)] == [None, "stop"]
    assert request.output_ids == [1, 3]
    assert "3" not in request.text.value


def test_a_stop_string_that_ends_in_a_stop_token():
    text = OutputText(lambda ids: "".join(map(str, ids)), "2<end>", {3: "<end>"}.get)
    request = Request(prompt_ids=[7], max_new_tokens=9, stop_token_ids={3}, text=text)
    assert [request.append(1), request.append(2), request.append(3)] == [None, None, "stop"]
    assert request.text.value == "1"


def test_a_request_decodes_when_only_its_newest_answer_token_is_left():
    request = Request(prompt_ids=[7], max_new_tokens=9)
    assert not request.is_decoding
    request.num_computed = 1
    request.append(1)
    assert request.is_decoding
