"""The tokenizer that a GGUF file describes under llama.cpp's `tokenizer.ggml.*` keys.

transformers (5.23) builds tokenizers from GGUF files only where torch is installed, so it is done here.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from paged_attn_layer._src.convert.gguf_file import open_gguf, read_field
from paged_attn_layer._src.convert.gguf_header import GGUFHeader
from paged_attn_layer._src.convert.gguf_sentencepiece import gemma_tokenizer, llama_tokenizer
from paged_attn_layer._src.convert.gguf_splits import SPLITS
from paged_attn_layer._src.convert.source import reading

_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""Names of special tokens in transformers, and in the file's keys."""
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}
"""The ids of special tokens that a file with SentencePiece does not state."""
_CONTROL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type
_GEMMA = ("gemma", "gemma2", "gemma3")
"""Architectures with Gemma's kind of SentencePiece."""

_ADVICE = (
    "load the tokenizer from the model's Hugging Face directory: "
    "Engine(load_model(file), tokenizer=load_tokenizer(directory))"
)
"""What to do with a file whose tokenizer cannot be read."""


def gguf_tokenizer(path: pathlib.Path) -> PreTrainedTokenizerFast:
    """The file's tokenizer, chat template included.

    Raises:
        ValueError: the file is missing, broken, or has no tokenizer.
        NotImplementedError: the tokenizer is of a kind that is not supported; names it.
    """
    reader = open_gguf(path)
    with reading(path):
        return _read_tokenizer(reader)


def _read_tokenizer(reader: GGUFHeader) -> PreTrainedTokenizerFast:
    kind = _required(reader, "model")
    if kind not in ("gpt2", "llama"):
        raise NotImplementedError(
            f"tokenizer.ggml.model={kind!r} is not supported in a GGUF file; 'gpt2' (byte-level BPE) and 'llama' "
            f"(SentencePiece) are; {_ADVICE}"
        )
    tokens = _required(reader, "tokens")
    ids = {name: _token_id(reader, key, kind, len(tokens)) for name, key in _NAMED.items()}
    tokenizer = _byte_level_bpe(reader, tokens) if kind == "gpt2" else _sentencepiece(reader, tokens, ids["unk_token"])
    _add_whole_tokens(tokenizer, tokens, read_field(reader, "tokenizer.ggml.token_type") or [])
    named = {name: tokens[index] for name, index in ids.items() if index is not None}
    first = named.get("bos_token") if _adds(reader, "bos", _adds_bos(reader, kind)) else None
    last = named.get("eos_token") if _adds(reader, "eos", False) else None
    tokenizer.post_processor = _between(tokenizer, first, last)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=read_field(reader, "tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **named,
    )


def _required(reader: GGUFHeader, key: str) -> Any:
    found = read_field(reader, f"tokenizer.ggml.{key}")
    if not found:
        raise ValueError(f"the file has no tokenizer.ggml.{key}; {_ADVICE}")
    return found


def _token_id(reader: GGUFHeader, key: str, kind: str, count: int) -> int | None:
    """The id of a special token, `None` if there is none."""
    assumed = _SENTENCEPIECE_IDS.get(key) if kind == "llama" else None
    index = reader.fields.get(f"tokenizer.ggml.{key}_token_id", assumed)
    if index in (None, -1, 2**32 - 1):  # -1 is how llama.cpp says that there is none
        return None
    if not isinstance(index, int) or not 0 <= index < count:
        raise ValueError(f"tokenizer.ggml.{key}_token_id={index!r} must be a token id, in 0..{count - 1}")
    return index


def _adds(reader: GGUFHeader, key: str, assumed: bool) -> bool:
    return bool(reader.fields.get(f"tokenizer.ggml.add_{key}_token", assumed))


def _adds_bos(reader: GGUFHeader, kind: str) -> bool:
    """True if texts start with the BOS token, where the file does not say."""
    return kind == "llama" or SPLITS[_cut(reader)].add_bos


def _between(tokenizer: Tokenizer, first: str | None, last: str | None) -> Any:
    """Puts the tokens before and after each text."""
    ends = {name: token for name, token in (("BOS", first), ("EOS", last)) if token is not None}
    text = [*(["BOS"] if first else []), "$A", *(["EOS"] if last else [])]
    return processors.TemplateProcessing(
        single=text,
        pair=[*text, *("$B" if part == "$A" else part for part in text)],
        special_tokens=[{"id": n, "ids": [tokenizer.token_to_id(t)], "tokens": [t]} for n, t in ends.items()],
    )


def _cut(reader: GGUFHeader) -> str:
    cut = read_field(reader, "tokenizer.ggml.pre") or "default"
    if cut not in SPLITS:
        raise NotImplementedError(f"tokenizer.ggml.pre={cut!r} is not supported; {', '.join(SPLITS)} are; {_ADVICE}")
    return cut


def _byte_level_bpe(reader: GGUFHeader, tokens: Sequence[str]) -> Tokenizer:
    kind = SPLITS[_cut(reader)]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in _required(reader, "merges")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=kind.whole_words))
    if kind.nfc:
        tokenizer.normalizer = normalizers.NFC()
    splits: list[Any] = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in kind.splits]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(reader: GGUFHeader, tokens: Sequence[str], unknown: int | None) -> Tokenizer:
    """The kind that the file's architecture has."""
    unknown_token = None if unknown is None else tokens[unknown]
    if read_field(reader, "general.architecture") in _GEMMA:
        return gemma_tokenizer(tokens, unknown_token)
    spaced = bool(reader.fields.get("tokenizer.ggml.add_space_prefix", True))
    return llama_tokenizer(tokens, _required(reader, "scores"), unknown_token, add_space=spaced)


def _add_whole_tokens(tokenizer: Tokenizer, tokens: Sequence[str], kinds: Sequence[int]) -> None:
    """Add the tokens that are never cut: control tokens, which decoding can leave out, and those of the model.

    A token that is spelled otherwise in the vocabulary (Gemma's runs of spaces) is not added: it would get a new id.
    """
    typed = [pair for pair in zip(tokens, kinds, strict=False) if tokenizer.token_to_id(pair[0]) is not None]
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, kind in typed if kind == _CONTROL]
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, kind in typed if kind == _USER_DEFINED])
