import pytest
from hypothesis import given
from hypothesis import strategies as st

from paged_attn_layer._src.engine.text import OutputText, special_text, text_decoder


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


@pytest.mark.parametrize("token", [0x80, 0xE4, None])
def test_bytes_that_form_no_character_do_not_pile_up(token):
    """The work of each token does not grow with the tokens before it."""
    decoded = 0

    def decode(ids):
        nonlocal decoded
        decoded += len(ids)
        return "" if token is None else utf8(ids)

    output = OutputText(decode)
    for _ in range(1000):
        output.push(token or 0)
    assert output.value == ("" if token is None else "\ufffd" * 1000)
    assert decoded < 1000 * 64


def test_a_character_after_bytes_that_form_none_is_whole():
    output = OutputText(utf8, stop=["!"])
    for token in b"\x80" * 16 + "héé!".encode():
        output.push(token)
    assert output.value == "\ufffd" * 16 + "héé"


SPECIAL = {1: "<|im_end|>", 2: "<|im_start|>"}


def with_special(tokens, stop):
    """Pushes letters and special tokens in turn; the text, and how many tokens it took to stop."""
    letters = lambda ids: "".join(chr(i) for i in ids if i not in SPECIAL)  # noqa: E731
    output = OutputText(letters, stop, lambda token_id: SPECIAL.get(token_id, ""))
    for count, token in enumerate(tokens, 1):
        if output.push(token):
            return output.value, count
    return output.value, None


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("<|im_end|>", ("world", 6)),
        ("world<|im_end|>", ("", 6)),
        ("ld<|im_end|>", ("wor", 6)),
        ("d<|im_end|><|im_start|>u", ("worl", 8)),
        ("_end|>", ("world", 6)),
        ("<|im_start|>u", ("world", 8)),
        ("du", ("worldus", None)),
        ("us", ("world", 9)),
        ((), ("worldus", None)),
    ],
)
def test_stop_strings_see_special_tokens_and_the_text_does_not(stop, expected):
    assert with_special([*b"world", 1, 2, *b"us"], stop) == expected


def test_a_stop_string_may_end_in_the_token_that_ends_the_text():
    output = OutputText(utf8, "d<|im_end|>", lambda token_id: SPECIAL.get(token_id, ""))
    for token in b"world":
        assert not output.push(token)
    output.end(1)
    assert output.value == output.settled == "worl"


def test_a_text_that_starts_again_sees_the_same():
    output = OutputText(utf8, "d<|im_end|>", lambda token_id: SPECIAL.get(token_id, "")).restarted()
    for token in b"world":
        assert not output.push(token)
    assert output.push(1)
    assert output.settled == "worl"


def test_a_special_token_is_one_that_decoding_leaves_out():
    text = special_text(Letters())
    assert (text(0), text(72)) == ("\0", "")


def test_spaces_between_words_are_kept():
    output = OutputText(words)
    for i in (1, 2, 3):
        output.push(i)
    assert output.value == "1 2 3"


def test_one_stop_string_may_be_given_alone():
    output = OutputText(utf8, stop="lo")
    assert [output.push(token) for token in b"hello"][-1]
    assert output.value == "hel"


def test_a_stop_string_before_bytes_that_never_become_a_character():
    """Its token waits for more bytes; none come."""
    decode = {1: "a", 2: "bSTOP\ufffd"}.__getitem__
    text = OutputText(lambda ids: "".join(map(decode, ids)), ["STOP"])
    assert [text.push(token) for token in (1, 2)] == [False, False]
    assert text.finish()
    assert text.finish()
    assert text.value == "ab"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="has an empty string; each must have at least one character"):
        OutputText(utf8, stop=["a", ""])


class Letters:
    """A tokenizer whose tokens are letters; token 0 is special."""

    eos_token_id = chat_template = None

    def decode(self, token_ids, *, skip_special_tokens):
        return "".join(chr(i) for i in token_ids if i or not skip_special_tokens)


def test_special_tokens_are_no_text():
    assert text_decoder(Letters())([72, 0, 105]) == "Hi"
