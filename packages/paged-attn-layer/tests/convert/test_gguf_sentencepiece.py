"""The reference is transformers: its classes, and how it finds merges."""

import random

import pytest
from tiny_checkpoints import finish, gguf_writer
from transformers import GemmaTokenizer, LlamaTokenizer
from transformers.convert_slow_tokenizer import generate_merges

from paged_attn_layer._src.convert.gguf_tokenizer import gguf_tokenizer

SPACE = "\u2581"
WORDS = ["he", "ll", "hello", "lo", "hell", "ow", "wor", "or", "ld", "world", SPACE + "w", SPACE + "hello", SPACE * 2]
LETTERS = [*"helowrdx", SPACE, "é"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LLAMA = ["<unk>", "<s>", "</s>", *BYTES, *WORDS, *LETTERS, "[INST]"]
LLAMA_KINDS = [2, 3, 3, *[6] * 256, *[1] * (len(WORDS) + len(LETTERS)), 4]
SCORES = [0.0] * 259 + [-float(n) for n in range(len(WORDS))] + [-1000.0 - n for n in range(len(LETTERS))] + [0.0]
GEMMA = ["<pad>", "<eos>", "<bos>", "<unk>", *BYTES, *LETTERS, *WORDS, SPACE * 3, "<start_of_turn>"]
GEMMA_KINDS = [3, 3, 3, 2, *[6] * 256, *[1] * (len(LETTERS) + len(WORDS) + 1), 3]
TEXTS = [
    "hello world",
    " hello  world ",
    "helloworld",
    "",
    " ",
    "   hello",
    "hello\nworld\n\n",
    "x\u4e2d\U0001f600y",
    "[INST] hello[INST]world </s>hello",
    "<s>hello",
    "é e\u0301",
    "<start_of_turn>hello<eos> world",
]


def written(path, architecture, tokens, kinds, scores, **settings):
    writer = gguf_writer(path, architecture)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if scores:
        writer.add_token_scores(scores)
    for key, value in settings.items():
        (writer.add_bool if isinstance(value, bool) else writer.add_uint32)(f"tokenizer.ggml.{key}", value)
    finish(writer)
    return path


def llama_file(path, **settings):
    return written(path, "llama", LLAMA, LLAMA_KINDS, SCORES, **settings)


def llama_reference(**settings):
    merges = generate_merges({token: n for n, token in enumerate(LLAMA)}, dict(zip(LLAMA, SCORES, strict=True)))
    vocab = {token: n for n, token in enumerate(LLAMA)}
    tokenizer = LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=True, **settings)
    tokenizer.add_tokens(["[INST]"])
    return tokenizer


def texts():
    rng = random.Random(0)
    pieces = [*"helowrd ", "  ", "hello", " world", "\n", "é", "\u4e2d", "</s>", "[INST]", "<eos>"]
    return TEXTS + ["".join(rng.choices(pieces, k=rng.randrange(1, 12))) for _ in range(200)]


def assert_same(tokenizer, reference):
    for text in texts():
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text), text
        assert tokenizer.decode(ids) == reference.decode(ids), text
        assert tokenizer.decode(ids, skip_special_tokens=True) == reference.decode(ids, skip_special_tokens=True), text


@pytest.mark.parametrize("add_space", [True, False])
def test_llama(tmp_path, add_space):
    """Llama 2, Mistral. The ids of its special tokens may be left out."""
    tokenizer = gguf_tokenizer(llama_file(tmp_path / "t.gguf", add_space_prefix=add_space))
    assert (tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token) == ("<unk>", "<s>", "</s>")
    assert_same(tokenizer, llama_reference(add_prefix_space=add_space))


def test_gemma(tmp_path):
    """Files have runs of spaces in place of the sign for a space."""
    tokens = [" " * len(token) if set(token) == {SPACE} and len(token) > 1 else token for token in GEMMA]
    ids = {"bos_token_id": 2, "eos_token_id": 1, "unknown_token_id": 3, "padding_token_id": 0, "add_bos_token": True}
    kinds = [4 if token.strip(" ") == "" else kind for token, kind in zip(tokens, GEMMA_KINDS, strict=True)]
    tokenizer = gguf_tokenizer(written(tmp_path / "t.gguf", "gemma2", tokens, kinds, None, **ids))
    assert len(tokenizer) == len(GEMMA)
    vocab = {token: n for n, token in enumerate(GEMMA)}
    merges = generate_merges(vocab, {token: -n for token, n in vocab.items()})
    reference = GemmaTokenizer(vocab=vocab, merges=merges, mask_token=None, add_bos_token=True)
    reference.add_special_tokens({"additional_special_tokens": ["<start_of_turn>"]})
    assert_same(tokenizer, reference)


def test_bos_and_eos(tmp_path):
    assert gguf_tokenizer(llama_file(tmp_path / "a.gguf")).encode("x")[0] == 1
    without = gguf_tokenizer(llama_file(tmp_path / "b.gguf", add_bos_token=False))
    assert without.encode("x")[0] != 1
    both = gguf_tokenizer(llama_file(tmp_path / "c.gguf", add_eos_token=True))
    assert both.encode("x") == [1, *without.encode("x"), 2]


def test_files_that_lack_a_part(tmp_path):
    with pytest.raises(ValueError, match=r"t.gguf: the file has no tokenizer.ggml.scores"):
        gguf_tokenizer(written(tmp_path / "t.gguf", "llama", LLAMA, LLAMA_KINDS, None))
    with pytest.raises(ValueError, match=r"u.gguf cannot be read"):
        gguf_tokenizer(written(tmp_path / "u.gguf", "llama", LLAMA, LLAMA_KINDS, SCORES[:-20]))
    with pytest.raises(ValueError, match=r"v.gguf: tokenizer.ggml.tokens has a token of 9000 characters; at most 512"):
        gguf_tokenizer(written(tmp_path / "v.gguf", "llama", [*LLAMA, "a" * 9000], LLAMA_KINDS, [*SCORES, 0.0]))
