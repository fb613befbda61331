import pytest
from tiny_checkpoints import finish, gguf_writer

from paged_attn_layer._src.convert.gguf_tokenizer import gguf_tokenizer

TOKENS = ["<unk>", "<s>", "</s>", *"abĠ12'sN", "ab", "Ġab", "12", "<tool>"]
KINDS = [3, 3, 3, *[1] * 8, 1, 1, 1, 4]
MERGES = ["a b", "Ġ ab", "1 2"]


def written(path, *, pre="smollm", model="gpt2", bos=False, tokens=TOKENS):
    writer = gguf_writer(path)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    if tokens:
        writer.add_token_list(tokens)
        writer.add_token_types(KINDS)
        writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(bos)
    writer.add_chat_template("{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}")
    finish(writer)
    return path


@pytest.mark.parametrize("none", [-1, 2**32 - 1])
def test_minus_one_is_no_token(tmp_path, none):
    writer = gguf_writer(tmp_path / "t.gguf")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(MERGES)
    (writer.add_int32 if none < 0 else writer.add_uint32)("tokenizer.ggml.eos_token_id", none)
    finish(writer)
    assert gguf_tokenizer(tmp_path / "t.gguf").eos_token is None


@pytest.mark.parametrize("wrong", [-2, len(TOKENS)])
def test_a_special_token_outside_the_vocabulary(tmp_path, wrong):
    writer = gguf_writer(tmp_path / "t.gguf")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(MERGES)
    writer.add_int32("tokenizer.ggml.bos_token_id", wrong)
    finish(writer)
    with pytest.raises(ValueError, match=rf"tokenizer.ggml.bos_token_id={wrong} must be a token id, in 0..14"):
        gguf_tokenizer(tmp_path / "t.gguf")


def tokens_of(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer.encode(text))


def test_merges_digits_and_whole_tokens(tmp_path):
    tokenizer = gguf_tokenizer(written(tmp_path / "t.gguf"))
    assert tokens_of(tokenizer, "ab ab12</s><tool>") == ["ab", "Ġab", "1", "2", "</s>", "<tool>"]
    assert tokens_of(gguf_tokenizer(written(tmp_path / "u.gguf", pre="gpt-2")), "ab12") == ["ab", "12"]
    ids = tokenizer.encode("ab ab12</s>")
    assert tokenizer.decode(ids) == "ab ab12</s>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab ab12"


@pytest.mark.parametrize("pre", ["default", "llama-bpe", "qwen2"])
def test_every_way_to_cut_text_keeps_all_of_it(tmp_path, pre):
    tokenizer = gguf_tokenizer(written(tmp_path / "t.gguf", pre=pre))
    assert tokenizer.decode(tokenizer.encode("ab a's 12 b")) == "ab a's 12 b"


def test_special_tokens_and_chat_template(tmp_path):
    tokenizer = gguf_tokenizer(written(tmp_path / "t.gguf", bos=True))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer.encode("ab")[0] == 1
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "<s>ab</s>"


def test_kinds_that_are_not_supported(tmp_path):
    with pytest.raises(NotImplementedError, match=r"tokenizer.ggml.model='llama' is not supported"):
        gguf_tokenizer(written(tmp_path / "t.gguf", model="llama"))
    with pytest.raises(NotImplementedError, match=r"tokenizer.ggml.pre='tekken' is not supported; default"):
        gguf_tokenizer(written(tmp_path / "u.gguf", pre="tekken"))


def test_a_file_without_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"has no tokenizer.ggml.tokens"):
        gguf_tokenizer(written(tmp_path / "t.gguf", tokens=None))
