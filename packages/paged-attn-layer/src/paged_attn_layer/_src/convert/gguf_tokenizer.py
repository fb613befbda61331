"""The tokenizer that a GGUF file describes under llama.cpp's `tokenizer.ggml.*` keys.

transformers (5.23) builds tokenizers from GGUF files only where torch is installed, so it is done here.
"""

import pathlib
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from paged_attn_layer._src.convert.gguf_file import open_gguf, read_field
from paged_attn_layer._src.convert.gguf_header import GGUFHeader

_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_SPLITS = {
    "default": (_GPT2_SPLIT,),
    "gpt-2": (_GPT2_SPLIT,),
    "smollm": (r"\p{N}", _GPT2_SPLIT),
    "llama-bpe": (_WORDS_SPLIT % "{1,3}",),
    "qwen2": (_WORDS_SPLIT % "",),
}
"""Regular expressions that cut a text before tokens are merged, by `tokenizer.ggml.pre`. They are applied in turn.

They are those in the tokenizer.json of GPT-2, SmolLM, Llama 3 and Qwen 2."""

_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""Names of special tokens in transformers, and in the file's keys."""
_CONTROL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type


def gguf_tokenizer(path: pathlib.Path) -> PreTrainedTokenizerFast:
    """The file's tokenizer, chat template included.

    Raises:
        ValueError: the file is missing, broken, or has no tokenizer.
        NotImplementedError: the tokenizer is of a kind that is not supported; names it.
    """
    reader = open_gguf(path)
    tokens = read_field(reader, "tokenizer.ggml.tokens")
    if not tokens:
        raise ValueError(f"{path} has no tokenizer.ggml.tokens; load the tokenizer from the model's directory")
    named = {name: _token_at(reader, tokens, key) for name, key in _NAMED.items()}
    tokenizer = _byte_level_bpe(reader, tokens)
    if read_field(reader, "tokenizer.ggml.add_bos_token") and named["bos_token"]:
        bos = named["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokens.index(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=read_field(reader, "tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in named.items() if token is not None},
    )


def _byte_level_bpe(reader: GGUFHeader, tokens: list[str]) -> Tokenizer:
    kind, cut = read_field(reader, "tokenizer.ggml.model"), read_field(reader, "tokenizer.ggml.pre") or "default"
    if kind != "gpt2":
        raise NotImplementedError(
            f"tokenizer.ggml.model={kind!r} is not supported in a GGUF file; only 'gpt2' (byte-level BPE) is. "
            "Load the tokenizer from the model's Hugging Face directory"
        )
    if cut not in _SPLITS:
        raise NotImplementedError(f"tokenizer.ggml.pre={cut!r} is not supported; {', '.join(_SPLITS)} are")
    merges = [tuple(merge.split(" ")) for merge in read_field(reader, "tokenizer.ggml.merges")]
    vocab = {token: index for index, token in enumerate(tokens)}
    # Llama 3 does not merge a word that is a token already.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=cut == "llama-bpe"))
    if cut == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    splits: list[Any] = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in _SPLITS[cut]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    _add_whole_tokens(tokenizer, tokens, read_field(reader, "tokenizer.ggml.token_type") or [])
    return tokenizer


def _add_whole_tokens(tokenizer: Tokenizer, tokens: list[str], kinds: list[int]) -> None:
    """Add the tokens that are never cut: control tokens, which decoding can leave out, and those of the model."""
    typed = list(zip(tokens, kinds, strict=False))
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, kind in typed if kind == _CONTROL]
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, kind in typed if kind == _USER_DEFINED])


def _token_at(reader: GGUFHeader, tokens: list[str], key: str) -> str | None:
    index = read_field(reader, f"tokenizer.ggml.{key}_token_id")
    if index in (None, -1, 2**32 - 1):  # -1 is how llama.cpp says that there is none
        return None
    if not isinstance(index, int) or not 0 <= index < len(tokens):
        raise ValueError(f"tokenizer.ggml.{key}_token_id={index!r} must be a token id, in 0..{len(tokens) - 1}")
    return tokens[index]
