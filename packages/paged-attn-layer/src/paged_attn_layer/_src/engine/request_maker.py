"""Makes requests of prompts: checks what is asked for, and turns text into token ids."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import cast

from paged_attn_layer._src.engine import checks
from paged_attn_layer._src.engine.params import SamplingParams
from paged_attn_layer._src.engine.prompts import Message, encode_chat, encode_text, is_chat
from paged_attn_layer._src.engine.request import Request
from paged_attn_layer._src.engine.text import OutputText, Tokenizer, special_text, text_decoder

PromptLike = str | Sequence[int] | Sequence[Message]
"""A text, token ids, or the messages of a chat."""


@dataclasses.dataclass(frozen=True)
class RequestMaker:
    """Makes the requests of one engine."""

    tokenizer: Tokenizer | None
    vocab_size: int
    end_tokens: frozenset[int]
    """Tokens that end an answer, if nothing else is asked for."""

    def make(self, prompt: PromptLike, sampling: SamplingParams, chat: bool | None, namespace: str) -> Request:
        """Returns a new request.

        Raises:
            ValueError: the prompt is empty or holds an id outside the vocabulary, or an argument cannot be used.
        """
        chat = checks.flag("chat", chat)
        checks.token_ids("logit_bias", sampling.logit_bias.keys(), self.vocab_size, ordered=False)
        return Request(
            prompt_ids=self._prompt_ids(prompt, chat),
            max_new_tokens=sampling.max_new_tokens,
            stop_token_ids=self._stop_tokens(sampling),
            text=self._text(tuple(sampling.stop)),
            namespace=namespace,
            sampling=sampling,
        )

    def _text(self, stop: tuple[str, ...]) -> OutputText | None:
        if self.tokenizer is not None:
            return OutputText(text_decoder(self.tokenizer), stop, special_text(self.tokenizer))
        if stop:
            raise ValueError(f"stop={stop!r} needs a tokenizer; build the engine with tokenizer=...")
        return None

    def _stop_tokens(self, sampling: SamplingParams) -> frozenset[int]:
        asked = frozenset(checks.token_ids("stop_token_ids", sampling.stop_token_ids, self.vocab_size, ordered=False))
        stops = asked if sampling.ignore_end_tokens else asked | self.end_tokens
        if sampling.min_new_tokens and len(stops) == self.vocab_size:
            raise ValueError(f"min_new_tokens={sampling.min_new_tokens} needs a token that is no stop token; all are")
        return stops

    def _prompt_ids(self, prompt: PromptLike, chat: bool | None) -> list[int]:
        if isinstance(prompt, Mapping):
            raise ValueError(f"the prompt is one message; it must be a list of messages: [{prompt!r}]")
        if not isinstance(prompt, str) and not is_chat(prompt):
            return checks.token_ids("the prompt", cast(Sequence[int], prompt), self.vocab_size)
        if self.tokenizer is None:
            raise ValueError("a text prompt needs a tokenizer; build the engine with tokenizer=...")
        if isinstance(prompt, str):
            encoded = encode_text(self.tokenizer, checks.text("prompt", prompt), chat)
        else:
            encoded = encode_chat(self.tokenizer, cast(Sequence[Message], prompt), chat)
        remedy = ", the model's vocabulary; it comes from the tokenizer: load the one of this model"
        return checks.token_ids("the prompt", encoded, self.vocab_size, remedy)


def end_tokens(tokenizer: Tokenizer | None) -> frozenset[int]:
    """Returns the end tokens that the tokenizer knows: one, several or none."""
    end = None if tokenizer is None else tokenizer.eos_token_id
    return frozenset() if end is None else frozenset(end if isinstance(end, list | tuple) else [end])
