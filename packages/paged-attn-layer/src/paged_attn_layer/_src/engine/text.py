"""Turns token ids into text, one token at a time, and ends the text at a stop string."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

Decode = Callable[[list[int]], str]
"""A function from token ids to their text, without special tokens."""


class Tokenizer(Protocol):
    """The methods of a tokenizer that the engine calls. Tokenizers of transformers have them."""

    chat_template: Any
    eos_token_id: Any

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text."""
        ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> Any:
        """Returns the text of token ids."""
        ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, add_generation_prompt: bool, return_dict: bool
    ) -> Any:
        """Returns the token ids of a conversation, up to the start of the answer."""
        ...


def encode_prompt(tokenizer: Tokenizer, prompt: str, chat: bool | None) -> list[int]:
    """Returns the token ids of a prompt.

    Args:
        tokenizer: its encoder and chat template are used.
        prompt: the text.
        chat: if true, put the prompt into the chat template, as the user's turn. `None`: if there is a template.

    Raises:
        ValueError: the prompt is empty, or `chat` is true and there is no chat template.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty; it must have some text")
    if chat and not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; use chat=False (--no-chat)")
    if chat is False or not tokenizer.chat_template:
        return tokenizer.encode(prompt)
    turns = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)


def text_decoder(tokenizer: Tokenizer) -> Decode:
    """Returns the tokenizer's `decode` without special tokens."""
    return functools.partial(tokenizer.decode, skip_special_tokens=True)


_INCOMPLETE = "\ufffd"  # decoders return this for bytes that do not form a whole character


class OutputText:
    """The text of tokens that arrive one at a time, cut at the first stop string.

    Tokens cannot be decoded alone. One character may take several tokens, and some decoders add or drop a space at
    the start of a text. So `push` decodes the previous tokens with and without the new ones, and takes the difference.
    It waits until the difference ends in a whole character. Stop strings are searched in the text, so a stop string
    may begin and end inside a token.

    >>> text = OutputText(lambda ids: "".join(map(chr, ids)), stop=["lo w"])
    >>> [text.push(ord(letter)) for letter in "hello w"]
    [False, False, False, False, False, False, True]
    >>> text.value
    'hel'
    """

    def __init__(self, decode: Decode, stop: str | Sequence[str] = ()) -> None:
        """Start with an empty text.

        Args:
            decode: returns the text of token ids.
            stop: one string or several that end the text.

        Raises:
            ValueError: a stop string is empty.
        """
        self._decode = decode
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in self._stop:
            raise ValueError(f"stop={stop!r} has an empty string; each must have at least one character")
        self._ids: list[int] = []
        self._settled = ""
        self._context = 0  # decoding starts at this token, so that new tokens are decoded after others
        self._fresh = 0  # tokens from this one on are not in the settled text yet
        self._stopped = False

    def push(self, token_id: int) -> bool:
        """Add one token. Returns True if the text now contains a stop string, which ends it."""
        self._ids.append(token_id)
        new = self._unsettled()
        if not new or new.endswith(_INCOMPLETE):
            return False
        searched_from = max(0, len(self._settled) - max(map(len, self._stop), default=0))
        self._settled += new
        self._context, self._fresh = self._fresh, len(self._ids)
        return self._cut(searched_from)

    def restarted(self) -> "OutputText":
        """The text of no tokens yet, with the same decoder and stop strings."""
        return OutputText(self._decode, self._stop)

    @property
    def settled(self) -> str:
        """The part of the text that later tokens do not change."""
        return self._settled

    @property
    def value(self) -> str:
        """The text so far, up to the stop string."""
        return self._settled if self._stopped else self._settled + self._unsettled()

    def _unsettled(self) -> str:
        with_fresh = self._decode(self._ids[self._context :])
        return with_fresh[len(self._decode(self._ids[self._context : self._fresh])) :]

    def _cut(self, searched_from: int) -> bool:
        found = [at for at in (self._settled.find(stop, searched_from) for stop in self._stop) if at >= 0]
        if found:
            self._settled = self._settled[: min(found)]
            self._stopped = True
        return self._stopped
