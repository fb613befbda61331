"""The tokens at which answers of a GGUF file's model end: those that it names, and those of well-known texts.

Facts from llama.cpp (src/llama-vocab.cpp): the keys and the texts. Older programs write files without `eot_token_id`,
though the model has such a token.
"""

from collections.abc import Iterator, Mapping
from typing import Any

_NO_TOKEN = (None, -1, 2**32 - 1)
"""How a file says that it has no such token."""
_TEXTS = {
    "eos": frozenset[str](),  # without the key there is none: no text is known to be this
    "eot": frozenset(
        {
            *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>"),
            *("<EOT>", "_<EOT>", "[EOT]", "<end_of_utterance>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
        }
    ),
    "eom": frozenset({"<|eom_id|>"}),
}
"""Texts of the tokens that end an answer, a turn and a message, each for files without the key of its kind."""
_PART_END = "<|end|>"
"""Ends only a part of the answer in the models that have these two tokens too (gpt-oss)."""
_WITH_PARTS = ("<|return|>", "<|call|>")


def end_token_ids(fields: Mapping[str, Any]) -> list[Any]:
    """The end tokens that the file names, and the tokens that have the texts of those that it does not name.

    >>> end_token_ids({"tokenizer.ggml.tokens": ["a", "<|im_end|>"], "tokenizer.ggml.eos_token_id": 0})
    [0, 1]
    """
    named = {kind: fields.get(f"tokenizer.ggml.{kind}_token_id") for kind in _TEXTS}
    texts = frozenset[str]().union(*(_TEXTS[kind] for kind, found in named.items() if found in _NO_TOKEN))
    tokens = fields.get("tokenizer.ggml.tokens") or []
    return [*(found for found in named.values() if found is not None), *_ids(tokens, texts)]


def _ids(tokens: list[str], texts: frozenset[str]) -> Iterator[int]:
    if all(token in tokens for token in _WITH_PARTS):
        texts -= {_PART_END}
    return (index for index, token in enumerate(tokens) if token in texts)
