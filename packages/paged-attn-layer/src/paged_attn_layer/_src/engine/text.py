"""From token ids to text, one token at a time, and the end of a text at a stop string."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

Decode = Callable[[list[int]], str]
"""Text of some token ids, special tokens left out."""


class Tokenizer(Protocol):
    """What the engine needs of a tokenizer; those of transformers have it."""

    chat_template: Any
    eos_token_id: Any

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> Any:
        """Text of token ids."""
        ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, add_generation_prompt: bool, return_dict: bool
    ) -> Any:
        """Token ids of a conversation, up to where the answer starts."""
        ...


def encode_prompt(tokenizer: Tokenizer, prompt: str, chat: bool | None) -> list[int]:
    """Token ids of a prompt, as the user's turn of a chat if `chat`; `None` means where there is a chat template.

    Raises:
        ValueError: the prompt is empty, or there is no chat template to put it into.
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
    """The tokenizer's `decode`, special tokens left out."""
    return functools.partial(tokenizer.decode, skip_special_tokens=True)


_INCOMPLETE = "\ufffd"  # what decoders give for bytes that are no whole character


class OutputText:
    """The text of tokens that arrive one by one, cut at the first stop string.

    A token is not a piece of text: one character may take several tokens, and some decoders write a token otherwise
    at the start of a text. So each push decodes the last settled tokens with and without the new ones, and takes the
    difference, once it ends in a whole character. Stop strings are looked for in the text, so they are found wherever
    the borders of the tokens fall.

    >>> text = OutputText(lambda ids: "".join(map(chr, ids)), stop=["lo w"])
    >>> [text.push(ord(letter)) for letter in "hello w"]
    [False, False, False, False, False, False, True]
    >>> text.value
    'hel'
    """

    def __init__(self, decode: Decode, stop: str | Sequence[str] = ()) -> None:
        """An empty text.

        Args:
            decode: gives the text of tokens.
            stop: the strings that end the text, or the one.

        Raises:
            ValueError: a stop string is empty, which would end every text before it starts.
        """
        self._decode = decode
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in self._stop:
            raise ValueError(f"stop={stop!r} has an empty string; each must have at least one character")
        self._ids: list[int] = []
        self._settled = ""
        self._context = 0  # tokens from here on give the settled text's end as context
        self._fresh = 0  # tokens from here on are not in the settled text yet
        self._stopped = False

    def push(self, token_id: int) -> bool:
        """Take one more token; True when the text now holds a stop string, which ends it."""
        self._ids.append(token_id)
        new = self._unsettled()
        if not new or new.endswith(_INCOMPLETE):
            return False
        searched_from = max(0, len(self._settled) - max(map(len, self._stop), default=0))
        self._settled += new
        self._context, self._fresh = self._fresh, len(self._ids)
        return self._cut(searched_from)

    @property
    def value(self) -> str:
        """The text so far, without the stop string and what follows it."""
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
