import pytest

from paged_attn_layer._src.convert.gguf_end_tokens import end_token_ids

TOKENS = ["a", "</s>", "<|im_end|>", "<|eom_id|>", "b", "<|endoftext|>"]


def ends(tokens=TOKENS, **ids):
    return end_token_ids(
        {"tokenizer.ggml.tokens": tokens} | {f"tokenizer.ggml.{k}_token_id": n for k, n in ids.items()}
    )


def test_tokens_of_well_known_texts_where_the_file_names_none():
    assert ends() == [2, 3, 5]
    assert ends(eos=1) == [1, 2, 3, 5]


@pytest.mark.parametrize("none", [-1, 2**32 - 1])
def test_minus_one_names_none(none):
    assert ends(eot=none) == [none, 2, 3, 5]


def test_a_named_token_goes_before_the_texts_of_its_kind():
    assert ends(eot=4) == [4, 3]
    assert ends(eom=4) == [4, 2, 5]
    assert ends(eos=1, eot=4, eom=0) == [1, 4, 0]


@pytest.mark.parametrize(
    "text",
    [
        *(
            "<|eot_id|>",
            "<|im_end|>",
            "<|end|>",
            "<end_of_turn>",
            "<|endoftext|>",
            "<|end_of_text|>",
            "<EOT>",
            "_<EOT>",
        ),
        *("[EOT]", "<end_of_utterance>", "<|eom_id|>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
    ],
)
def test_each_text(text):
    assert ends(["a", text]) == [1]


def test_the_end_of_a_part_is_no_end():
    assert ends(["<|end|>", "<|return|>", "<|call|>", "<|endoftext|>"]) == [3]
    assert ends(["<|end|>", "<|call|>"]) == [0]


def test_a_file_without_tokens():
    assert end_token_ids({"tokenizer.ggml.eos_token_id": 2}) == [2]
