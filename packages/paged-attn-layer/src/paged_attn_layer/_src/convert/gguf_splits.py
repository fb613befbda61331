"""How byte-level BPE of each kind cuts a text before tokens are merged, by `tokenizer.ggml.pre` of a GGUF file.

Facts from llama.cpp (src/llama-vocab.cpp): the kinds' names; their expressions, in the spelling of the tokenizer.json
that they come from, which llama.cpp states beside its own; which of them leave words that are tokens unmerged; in which
of them texts start with the BOS token. That Qwen's texts are normalised is from its tokenizer.json.
"""

import dataclasses

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_MARKED_WORDS = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _SPACES
_SEED_WORDS = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|" + _SPACES
_CASED_WORD = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
)
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
_TEKKEN = _CASED_WORD % ("", "") + r"|\p{N}" + _OTHERS
_GPT4O = _CASED_WORD % (_ENDINGS + "?", _ENDINGS + "?") + r"|\p{N}{1,3}" + _OTHERS
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    + _SPACES
)
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_SENTENCE_PARTS = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"


@dataclasses.dataclass(frozen=True)
class TextSplit:
    """What byte-level BPE of one kind does to a text."""

    splits: tuple[str, ...]
    """Regular expressions, applied in turn to each piece that the one before left."""
    whole_words: bool = False
    """A piece that is a token already is not merged from its parts."""
    add_bos: bool = False
    """Texts start with the BOS token, in a file that does not say."""
    nfc: bool = False
    """The text is first brought to Unicode's composed form."""


_KINDS = {
    "default gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de gigachat a.x-4.0 mellum modern-bert mpt olmo jais "
    "trillion granite-docling exaone4": TextSplit((_GPT2,)),
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2": TextSplit((r"\p{N}", _GPT2)),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano": TextSplit(
        (_WORDS % "{1,3}",), whole_words=True, add_bos=True
    ),
    "dbrx smaug-bpe glm4 chatglm-bpe": TextSplit((_WORDS % "{1,3}",)),
    "qwen2": TextSplit((_WORDS % "",), nfc=True),
    "deepseek-r1-qwen kormo f2llmv2 megrez hunyuan solar-open stablelm2 grok-2": TextSplit((_WORDS % "",)),
    "qwen35": TextSplit((_MARKED_WORDS,), nfc=True),
    "minicpm5": TextSplit((r"\p{N}{1,3}", _WORDS % "+"), whole_words=True),
    "seed-coder": TextSplit((_SEED_WORDS,)),
    "tekken": TextSplit((_TEKKEN,), whole_words=True, add_bos=True),
    "gpt-4o llama4 kanana2 talkie minimax-m2": TextSplit((_GPT4O,)),
    "deepseek-v3 hunyuan-dense joyai-llm": TextSplit((r"\p{N}{1,3}", _CJK, _DEEPSEEK3)),
    "deepseek-coder": TextSplit(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}")),
    "falcon": TextSplit((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "poro-chat bloom gpt3-finnish": TextSplit((_SENTENCE_PARTS,)),
    "viking": TextSplit((_SENTENCE_PARTS, r"\p{N}")),
}
SPLITS = {name: split for names, split in _KINDS.items() for name in names.split()}
"""What is done to a text, by `tokenizer.ggml.pre`."""
