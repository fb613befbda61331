"""Tokenizers of SentencePiece's kind, from the tokens and scores of a GGUF file.

What they do to a text is what transformers' `LlamaTokenizer` and `GemmaTokenizer` do. A file does not list the merges:
they are the ways to make a token of two others, as transformers' `generate_merges` finds them.
"""

from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

_SPACE = "\u2581"
"""What stands for a space in tokens."""
_LONGEST = 512
"""Characters of the longest token that is read. The time that merges take grows with the square of it."""


def llama_tokenizer(
    tokens: Sequence[str], scores: Sequence[float], unknown: str | None, *, add_space: bool
) -> Tokenizer:
    """Merges the tokens of the highest scores first. `add_space` puts a space before each text."""
    tokenizer = _bpe(tokens, scores.__getitem__, unknown)
    scheme = "first" if add_space else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme=scheme, split=False)
    tokenizer.decoder = _decoder(*([decoders.Strip(content=" ", left=1)] if add_space else []))
    return tokenizer


def gemma_tokenizer(tokens: Sequence[str], unknown: str | None) -> Tokenizer:
    """Merges the tokens of the lowest ids first, for the scores do not follow the merges that were learned."""
    spelled = [_SPACE * len(token) if token.strip(" ") == "" else token for token in tokens]  # files have spaces
    tokenizer = _bpe(spelled, lambda index: -index, unknown)
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = _decoder()
    return tokenizer


def _bpe(tokens: Sequence[str], score: Callable[[int], float], unknown: str | None) -> Tokenizer:
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = _merges(vocab, score)
    model = models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    return Tokenizer(model)


def _decoder(*more: Any) -> Any:
    return decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *more])


def _merges(vocab: dict[str, int], score: Callable[[int], float]) -> list[tuple[str, str]]:
    """Every two tokens that make a token, the highest score first, then the longest parts."""
    longest = max(map(len, vocab))
    if longest > _LONGEST:
        raise ValueError(f"tokenizer.ggml.tokens has a token of {longest} characters; at most {_LONGEST} are read")
    found = []
    for token, index in vocab.items():
        cuts = ((token[:place], token[place:]) for place in range(1, len(token)))
        pairs = [(left, right) for left, right in cuts if left in vocab and right in vocab]
        pairs.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        found += [(score(index), len(left), len(right), left, right) for left, right in pairs]
    found.sort(key=lambda merge: merge[:3], reverse=True)
    return [(left, right) for *_, left, right in found]
