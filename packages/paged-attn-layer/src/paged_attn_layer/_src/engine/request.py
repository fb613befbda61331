"""One request: what is asked of the engine, and how far the answer is."""

import dataclasses
import enum
from collections.abc import Collection
from typing import Literal

from paged_attn_layer._src.engine.text import OutputText
from paged_cache import Prompt

FinishReason = Literal["stop", "length", "aborted"]
"""Why an answer ended: a stop token or stop string, `max_new_tokens`, or `Scheduler.finish` from outside."""


class RequestState(enum.Enum):
    """Where a request is: NEW -> WAITING -> RUNNING -> FINISHED, and from RUNNING back to WAITING when preempted."""

    NEW = enum.auto()
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclasses.dataclass(eq=False, kw_only=True)
class Request:
    """A prompt to continue. The first five fields are what is asked; the scheduler owns the rest.

        token_ids    | prompt_ids ... | output_ids ... |
                     | computed (K and V in pages) | not computed |
                     0                             num_computed   num_tokens

    Raises:
        ValueError: the prompt is empty, or no new token is asked for.
    """

    prompt_ids: list[int]
    """The prompt, at least one token."""
    max_new_tokens: int
    """The answer ends after this many tokens, if nothing ends it before."""
    stop_token_ids: Collection[int] = frozenset()
    """Tokens that end the answer; the one that does is its last token, and no part of its text."""
    text: OutputText | None = None
    """The answer as text, which ends it at a stop string; `None` where there is no tokenizer."""

    namespace: str = ""
    """Only requests of the same namespace share pages; give each tenant one of its own."""

    token_ids: list[int] = dataclasses.field(init=False)
    seq: int | None = dataclasses.field(init=False, default=None)
    """The sequence that holds its pages while it runs."""
    known: Prompt | None = dataclasses.field(init=False, default=None)
    """While it waits: the tokens to find in pages."""
    num_computed: int = dataclasses.field(init=False, default=0)
    num_preemptions: int = dataclasses.field(init=False, default=0)
    state: RequestState = dataclasses.field(init=False, default=RequestState.NEW)
    finish_reason: FinishReason | None = dataclasses.field(init=False, default=None)

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError("the prompt is empty; it must have at least one token")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        self.token_ids = list(self.prompt_ids)

    @property
    def output_ids(self) -> list[int]:
        """The answer's tokens so far."""
        return self.token_ids[len(self.prompt_ids) :]

    @property
    def num_tokens(self) -> int:
        """Tokens known so far: the prompt's and the answer's."""
        return len(self.token_ids)

    @property
    def num_uncomputed(self) -> int:
        """Known tokens whose K and V are not in pages; computing the last of them gives the next token."""
        return self.num_tokens - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Whether only the newest token of the answer is left to compute."""
        return self.num_uncomputed == 1 and self.num_tokens > len(self.prompt_ids)

    @property
    def max_tokens(self) -> int:
        """The most tokens the request can come to have."""
        return len(self.prompt_ids) + self.max_new_tokens

    def append(self, token_id: int) -> FinishReason | None:
        """Take the next token of the answer; why the answer ends with it, or None."""
        self.token_ids.append(token_id)
        if token_id in self.stop_token_ids:
            return "stop"
        if self.text is not None and self.text.push(token_id):
            return "stop"
        return "length" if self.num_tokens == self.max_tokens else None
