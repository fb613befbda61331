import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from paged_attn_layer._src.engine.prompts import encode_chat, encode_text, is_chat

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = "{% for m in messages %}<|user|>\n{{ m['content'] }}</s>\n{% endfor %}<|assistant|>\n"
INST = "<s>{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('the user must begin') }}{% endif %}" + INST


def tokenizer(template=None, *, bos=False):
    """A tokenizer of bytes with a few special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: index for index, token in enumerate([*special, *letters])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, bos_token="<s>", eos_token="</s>")


def text_of(template, prompt, chat=None, *, bos=False):
    each = tokenizer(template, bos=bos)
    return each.decode(encode_text(each, prompt, chat), skip_special_tokens=False)


def test_the_chat_template_is_used_where_there_is_one():
    rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(None, "hi") == text_of(CHATML, "hi", False) == "hi"
    assert text_of(CHATML, "hi") == text_of(CHATML, "hi", True) == rendered


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("template", [CHATML, PLAIN, INST])
def test_a_rendered_prompt_is_taken_as_it_is(template, bos):
    """As what the template gives for the messages; with the token that starts texts, or with it cut off."""
    each = tokenizer(template, bos=bos)
    messages = [{"role": "user", "content": "hi"}]
    rendered = each.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = encode_chat(each, messages)
    assert encode_text(each, "hi", None) == expected
    assert encode_text(each, rendered, None) == expected
    if bos:
        assert encode_text(each, rendered.removeprefix("<s>"), None) == expected


def test_a_rendered_prompt_of_other_roles_is_taken_as_it_is():
    prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(CHATML, prompt) == prompt


def test_a_text_that_only_looks_like_a_rendered_one_is_put_into_the_template():
    assert text_of(CHATML, "user\nhi").startswith("<|im_start|>user\nuser\nhi")
    assert text_of(PLAIN, "hi <|user|>\n").startswith("<|user|>\nhi <|user|>")
    assert text_of(CHATML, "<|im_start|>user\nhi", True).startswith("<|im_start|>user\n<|im_start|>user")


@pytest.mark.parametrize("template", [None, INST])
def test_no_text_starts_twice(template):
    assert text_of(template, "<s>hi", False, bos=True) == "<s>hi"
    assert text_of(template, "hi", False, bos=True) == "<s>hi"
    assert text_of(template, "<s><s>hi", False, bos=True) == "<s><s>hi", "what a text says twice stays"


def test_messages():
    each = tokenizer(CHATML)
    messages = [{"role": role, "content": role[:2]} for role in ("system", "user", "assistant", "user")]
    text = each.decode(encode_chat(each, messages), skip_special_tokens=False)
    assert text == each.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert is_chat(messages)
    assert is_chat(tuple(messages))
    assert not any(is_chat(prompt) for prompt in ([], [1], "text", messages[0], 3))


@pytest.mark.parametrize(
    ("template", "messages", "chat", "message"),
    [
        (None, [{"role": "user", "content": "hi"}], None, "no chat template, which messages need; give a text instead"),
        (CHATML, [{"role": "user", "content": "hi"}], False, "chat must not be False"),
        (CHATML, [{"content": "hi"}], None, r"message 0 of the prompt is \{'content': 'hi'\}; it must be like"),
        (CHATML, [{"role": "user", "content": "hi"}, 3], None, "message 1 of the prompt is 3; it must be like"),
        (
            CHATML,
            [{"role": "user", "content": "a\ud800"}],
            None,
            "message 0 of the prompt has half of a surrogate pair",
        ),
        (
            STRICT,
            [{"role": "tool", "content": "hi"}],
            None,
            "chat template refuses the prompt: the user must begin",
        ),
    ],
)
def test_messages_that_cannot_be_used(template, messages, chat, message):
    with pytest.raises(ValueError, match=message):
        encode_chat(tokenizer(template), messages, chat)


def test_a_chat_without_a_template_is_refused():
    with pytest.raises(ValueError, match="no chat template; use chat=False"):
        encode_text(tokenizer(), "hi", True)


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_an_empty_text_is_refused(prompt):
    with pytest.raises(ValueError, match="the prompt is empty"):
        encode_text(tokenizer(), prompt, None)


@pytest.mark.parametrize(
    "message", [{"role": "a\ud800"}, {"role": "user", "content": [{"type": "text", "text": "a\ud800"}]}]
)
def test_half_of_a_surrogate_pair_anywhere_in_a_message(message):
    with pytest.raises(ValueError, match="message 1 of the prompt has half of a surrogate pair at character 1"):
        encode_chat(tokenizer(CHATML), [{"role": "user", "content": "hi"}, message])
