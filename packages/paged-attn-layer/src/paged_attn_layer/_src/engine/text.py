"""Turns token ids into text, one token at a time, and ends the text at a stop string."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

Decode = Callable[[list[int]], str]
"""A function from token ids to their text, without special tokens."""
SpecialText = Callable[[int], str]
"""A function from the id of a special token to its text. It gives `""` for any other token."""


class Tokenizer(Protocol):
    """The methods of a tokenizer that the engine calls. Tokenizers of transformers have them."""

    chat_template: Any
    eos_token_id: Any

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Returns the token ids of a text, by default with the special tokens that start or end every text."""
        ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> Any:
        """Returns the text of token ids."""
        ...

    def apply_chat_template(
        self, conversation: list[dict[str, Any]], *, add_generation_prompt: bool, tokenize: bool, return_dict: bool
    ) -> Any:
        """Returns a conversation up to the start of the answer: its token ids, or its text if `tokenize` is false."""
        ...


def text_decoder(tokenizer: Tokenizer) -> Decode:
    """Returns the tokenizer's `decode` without special tokens."""
    return functools.partial(tokenizer.decode, skip_special_tokens=True)


def special_text(tokenizer: Tokenizer) -> SpecialText:
    """Returns a function that gives the text of a special token, which the decoder of texts leaves out."""

    @functools.cache
    def text_of(token_id: int) -> str:
        if tokenizer.decode([token_id], skip_special_tokens=True):
            return ""
        return tokenizer.decode([token_id], skip_special_tokens=False)

    return text_of


_INCOMPLETE = "\ufffd"  # decoders return this for bytes that do not form a whole character
_LONGEST = 16  # most tokens that wait for a whole character; one has at most 4 bytes


class OutputText:
    """The text of tokens that arrive one at a time, cut at the first stop string.

    Tokens cannot be decoded alone. One character may take several tokens, and some decoders add or drop a space at
    the start of a text. So `push` decodes the previous tokens with and without the new ones, and takes the difference.
    It waits until the difference ends in a whole character, or is too long to become one. Stop strings are searched in
    the text, so a stop string may begin and end inside a token. Special tokens are no part of the text, but a stop
    string may name them.

    >>> text = OutputText(lambda ids: "".join(map(chr, ids)), stop=["lo w"])
    >>> [text.push(ord(letter)) for letter in "hello w"]
    [False, False, False, False, False, False, True]
    >>> text.value
    'hel'
    """

    def __init__(
        self, decode: Decode, stop: str | Sequence[str] = (), special: SpecialText = lambda token_id: ""
    ) -> None:
        """Start with an empty text.

        Args:
            decode: returns the text of token ids, without special tokens.
            stop: one string or several that end the text.
            special: returns the text of a special token, which only stop strings can see; `""` for any other token.

        Raises:
            ValueError: a stop string is empty.
        """
        self._decode = decode
        self._special = special
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in self._stop:
            raise ValueError(f"stop={stop!r} has an empty string; each must have at least one character")
        self._ids: list[
            int
        ] = []  # the last tokens: some whose text is settled, so that new ones are decoded after them
        self._fresh = 0  # tokens from this one on are not in the settled text yet
        self._settled = ""  # with special tokens
        self._hidden: list[tuple[int, int]] = []  # where in the settled text special tokens begin and end
        self._stopped = False

    def push(self, token_id: int) -> bool:
        """Add one token. Returns True if the text now contains a stop string, which ends it."""
        if self._stop and (text := self._special(token_id)):
            return self._push_special(text)
        self._ids.append(token_id)
        new = self._unsettled()
        if (not new or new.endswith(_INCOMPLETE)) and len(self._ids) - self._fresh < _LONGEST:
            return False
        return self._settle(new)

    def end(self, token_id: int) -> None:
        """Add the token that ends the text. It is no part of the text, but a stop string may end in it."""
        if self._stop and (text := self._special(token_id)):
            self._push_special(text)

    def restarted(self) -> "OutputText":
        """The text of no tokens yet, with the same decoder and stop strings."""
        return OutputText(self._decode, self._stop, self._special)

    def finish(self) -> bool:
        """Take the text of all tokens, for no more come. Returns True if a stop string ends it."""
        return self._stopped or self._settle(self._unsettled())

    @property
    def settled(self) -> str:
        """The part of the text that later tokens do not change."""
        starts, ends = [0, *(end for _, end in self._hidden)], [*(start for start, _ in self._hidden), None]
        return "".join(self._settled[start:end] for start, end in zip(starts, ends, strict=True))

    @property
    def value(self) -> str:
        """The text so far, up to the stop string."""
        return self.settled if self._stopped else self.settled + self._unsettled()

    def _unsettled(self) -> str:
        if self._fresh == len(self._ids):
            return ""
        return self._decode(self._ids)[len(self._decode(self._ids[: self._fresh])) :]

    def _settle(self, new: str) -> bool:
        """Take the text of all tokens so far. Returns True if it now contains a stop string."""
        if new:
            self._ids = self._ids[self._fresh :]
        else:  # tokens without text
            del self._ids[self._fresh :]
        self._fresh = len(self._ids)
        return self._add(new)

    def _push_special(self, text: str) -> bool:
        if self._settle(self._unsettled()):
            return True
        self._hidden.append((len(self._settled), len(self._settled) + len(text)))
        return self._add(text)

    def _add(self, new: str) -> bool:
        searched_from = max(0, len(self._settled) - max(map(len, self._stop), default=0))
        self._settled += new
        found = [at for at in (self._settled.find(stop, searched_from) for stop in self._stop) if at >= 0]
        if found:
            self._settled = self._settled[: min(found)]
            self._stopped = True
        return self._stopped
