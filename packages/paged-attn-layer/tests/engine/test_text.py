import pytest
from hypothesis import given
from hypothesis import strategies as st

from paged_attn_layer._src.engine.text import OutputText, encode_prompt, text_decoder


def utf8(ids):
    return bytes(ids).decode(errors="replace")


def words(ids):
    """As sentencepiece: a word starts with a space, but not at the start of a text."""
    return "".join(f" {i}" for i in ids)[1:]


@given(st.text(max_size=20), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_text_ends_at_the_first_stop_string_wherever_tokens_end(text, stop):
    output = OutputText(utf8, stop)
    for token in text.encode():
        if output.push(token):
            break
    ends = [end for s in stop if (end := text.find(s)) >= 0]
    if not ends:
        assert output.value == text
        return
    # Of stop strings the one that is complete first ends the text.
    complete = min(text.find(s) + len(s) for s in stop if s in text)
    assert output.value == text[: min(text[:complete].find(s) for s in stop if s in text[:complete])]


def test_a_stop_string_across_three_tokens():
    output = OutputText(words, stop=["1 2"])
    assert [output.push(i) for i in (5, 7, 21, 23)] == [False, False, False, True]
    assert output.value == "5 7 2"


def test_a_character_of_several_tokens_is_text_once_it_is_whole():
    output = OutputText(utf8, stop=["é"])
    first, second = "é".encode()
    assert not output.push(first)
    assert output.push(second)
    assert output.value == ""


def test_bytes_that_never_become_a_character_are_shown_as_such():
    output = OutputText(utf8)
    output.push(0xC3)
    assert output.value == "\ufffd"


def test_spaces_between_words_are_kept():
    output = OutputText(words)
    for i in (1, 2, 3):
        output.push(i)
    assert output.value == "1 2 3"


def test_one_stop_string_may_be_given_alone():
    output = OutputText(utf8, stop="lo")
    assert [output.push(token) for token in b"hello"][-1]
    assert output.value == "hel"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="has an empty string; each must have at least one character"):
        OutputText(utf8, stop=["a", ""])


class Letters:
    """A tokenizer whose tokens are letters."""

    eos_token_id = None

    def __init__(self, chat_template=None):
        self.chat_template = chat_template

    def encode(self, text):
        return [ord(letter) for letter in text]

    def decode(self, token_ids, *, skip_special_tokens):
        return "".join(chr(i) for i in token_ids if i or not skip_special_tokens)

    def apply_chat_template(self, conversation, *, add_generation_prompt, return_dict):
        assert add_generation_prompt
        assert not return_dict
        return self.encode(f"<{conversation[0]['role']}>{conversation[0]['content']}<answer>")


def test_the_chat_template_is_used_where_there_is_one():
    plain, chatty = Letters(), Letters("template")
    assert plain.decode(encode_prompt(plain, "hi", None), skip_special_tokens=True) == "hi"
    assert chatty.decode(encode_prompt(chatty, "hi", None), skip_special_tokens=True) == "<user>hi<answer>"
    assert chatty.decode(encode_prompt(chatty, "hi", False), skip_special_tokens=True) == "hi"


def test_a_chat_without_a_template_is_refused():
    with pytest.raises(ValueError, match="no chat template; use chat=False"):
        encode_prompt(Letters(), "hi", True)


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_an_empty_text_is_refused(prompt):
    with pytest.raises(ValueError, match="the prompt is empty"):
        encode_prompt(Letters(), prompt, None)


def test_special_tokens_are_no_text():
    assert text_decoder(Letters())([72, 0, 105]) == "Hi"
