import pytest
from tiny_checkpoints import finish, gguf_writer
from tokenizers import Regex, pre_tokenizers

from paged_attn_layer._src.convert.gguf_splits import SPLITS
from paged_attn_layer._src.convert.gguf_tokenizer import gguf_tokenizer

TOKENS = ["<unk>", "<s>", "</s>", *"abĠ12'sN", "ab", "Ġab", "12", "<tool>"]
KINDS = [3, 3, 3, *[1] * 8, 1, 1, 1, 4]
MERGES = ["a b", "Ġ ab", "1 2"]


def written(path, *, pre="smollm", model="gpt2", bos=False, eos=None, tokens=TOKENS, eos_id=2, merges=MERGES):
    writer = gguf_writer(path)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    if tokens:
        writer.add_token_list(tokens)
        writer.add_token_types(KINDS)
        writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_uint32("tokenizer.ggml.eos_token_id", eos_id)
    writer.add_unk_token_id(0)
    if bos is not None:
        writer.add_add_bos_token(bos)
    if eos is not None:
        writer.add_add_eos_token(eos)
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


@pytest.mark.parametrize("pre", SPLITS)
def test_every_way_to_cut_text_keeps_all_of_it(tmp_path, pre):
    tokenizer = gguf_tokenizer(written(tmp_path / "t.gguf", pre=pre))
    assert tokenizer.decode(tokenizer.encode("ab a's 12 b")) == "ab a's 12 b"


def test_special_tokens_and_chat_template(tmp_path):
    tokenizer = gguf_tokenizer(written(tmp_path / "t.gguf", bos=True))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer.encode("ab")[0] == 1
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "<s>ab</s>"


@pytest.mark.parametrize(
    ("pre", "starts"),
    [("llama-bpe", True), ("llama3", True), ("tekken", True), ("falcon3", True), ("qwen2", False), ("smollm", False)],
)
def test_bos_of_files_that_do_not_say(tmp_path, pre, starts):
    assert (gguf_tokenizer(written(tmp_path / "t.gguf", pre=pre, bos=None)).encode("ab")[0] == 1) is starts
    assert gguf_tokenizer(written(tmp_path / "u.gguf", pre=pre, bos=False)).encode("ab")[0] != 1


def test_eos(tmp_path):
    tokenizer = gguf_tokenizer(written(tmp_path / "t.gguf", bos=True, eos=True))
    assert tokens_of(tokenizer, "ab") == ["<s>", "ab", "</s>"]
    pair = tokenizer("ab", "ab")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(pair) == ["<s>", "ab", "</s>", "<s>", "ab", "</s>"]
    assert tokens_of(gguf_tokenizer(written(tmp_path / "u.gguf", eos=False)), "ab") == ["ab"]


def test_special_tokens_whose_names_mean_something_to_templates(tmp_path):
    tokens = ["<unk>", "$A:1 <s>", "$B", *TOKENS[3:]]
    tokenizer = gguf_tokenizer(written(tmp_path / "t.gguf", bos=True, eos=True, tokens=tokens))
    assert tokens_of(tokenizer, "ab") == ["$A:1 <s>", "ab", "$B"]


def test_eos_of_a_file_that_has_none(tmp_path):
    tokenizer = gguf_tokenizer(written(tmp_path / "t.gguf", eos=True, eos_id=2**32 - 1))
    assert tokenizer.eos_token is None
    assert tokens_of(tokenizer, "ab") == ["ab"]


TEXT = "I'LL go'S 12345 Hello helloWorld\n\n  x  \t $+=/?!\u4e2d\u6587\u3042 e\u0301 \u06d4 a/b\n/ 1234.5 NASA's"


def test_pieces_are_those_of_transformers():
    """Of each kind of which transformers (from 5.23) has the expression."""
    theirs = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping").GGUF_PRE_TOKENIZER_SPLITS
    for pre, split in theirs.items():
        assert pieces(*SPLITS[pre].splits) == pieces(split), pre


def pieces(*splits, text=TEXT):
    cut = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), behavior="isolated") for split in splits])
    return cut.pre_tokenize_str(text)


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("deepseek-v3", "12345 don't", ["123", "45", " don", "'t"]),
        ("deepseek-coder", "a\n12", ["a", "\n", "1", "2"]),
        ("falcon", "1234", ["123", "4"]),
        ("viking", "ab 12", ["ab", " ", "1", "2"]),
        ("poro-chat", "ab 12.", ["ab", " 12", "."]),
        ("seed-coder", "12 ++\n", ["1", "2", " ++", "\n"]),
        ("minicpm5", "12345", ["123", "45"]),
        ("starcoder", "ab12", ["ab", "1", "2"]),
    ],
)
def test_pieces_of_other_kinds(pre, text, expected):
    assert [piece for piece, _ in pieces(*SPLITS[pre].splits, text=text)] == expected


@pytest.mark.parametrize("model", ["t5", "bert", "rwkv", "plamo2", "gemma4", "hybriddna", "no_vocab", "none"])
def test_models_that_are_not_supported(tmp_path, model):
    tokens = None if model in ("no_vocab", "none") else TOKENS
    with pytest.raises(NotImplementedError, match=rf"t.gguf: .*model='{model}' is not supported .*{ADVICE}"):
        gguf_tokenizer(written(tmp_path / "t.gguf", model=model, tokens=tokens))


@pytest.mark.parametrize("pre", ["deepseek-llm", "kimi-k2", "chameleon", "tiny_aya", "youtu", "afmoe", "jais-2", "new"])
def test_kinds_that_are_not_supported(tmp_path, pre):
    with pytest.raises(NotImplementedError, match=rf"u.gguf: .*pre='{pre}' is not supported; default, .*{ADVICE}"):
        gguf_tokenizer(written(tmp_path / "u.gguf", pre=pre))


ADVICE = r"load the tokenizer from the model's Hugging Face directory: Engine\(load_model\(file\), tokenizer="


def test_a_file_without_the_kind_of_its_tokenizer(tmp_path):
    writer = gguf_writer(tmp_path / "t.gguf")
    writer.add_token_list(TOKENS)
    finish(writer)
    with pytest.raises(ValueError, match=rf"has no tokenizer.ggml.model; {ADVICE}"):
        gguf_tokenizer(tmp_path / "t.gguf")


@pytest.mark.parametrize("merges", [["ab"], ["a b 1"], ["a nowhere"]])
def test_broken_merges(tmp_path, merges):
    with pytest.raises(ValueError, match=r"t.gguf cannot be read"):
        gguf_tokenizer(written(tmp_path / "t.gguf", merges=merges))


def test_a_file_without_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"has no tokenizer.ggml.tokens"):
        gguf_tokenizer(written(tmp_path / "t.gguf", tokens=None))
