"""One request: a prompt to answer, and the answer so far."""

import dataclasses
import enum
from collections.abc import Collection
from typing import Literal

from paged_attn_layer._src.engine.text import OutputText
from paged_cache import Prompt

FinishReason = Literal["stop", "length", "aborted"]
"""Why an answer ended: by a stop token or stop string, at `max_new_tokens`, or by `Scheduler.finish`."""


class RequestState(enum.Enum):
    """NEW -> WAITING -> RUNNING -> FINISHED. A preempted request goes from RUNNING back to WAITING."""

    NEW = enum.auto()
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclasses.dataclass(eq=False, kw_only=True)
class Request:
    """A prompt to continue. The caller sets the arguments of the constructor; the scheduler sets all other fields.

        token_ids    | prompt_ids ... | output_ids ... |
                     | computed (K and V in pages) | not computed |
                     0                             num_computed   num_tokens

    Raises:
        ValueError: the prompt is empty, or `max_new_tokens` is less than 1.
    """

    prompt_ids: list[int]
    """Tokens of the prompt, at least one."""
    max_new_tokens: int
    """Most tokens of the answer."""
    stop_token_ids: Collection[int] = frozenset()
    """Tokens that end the answer. The stop token is in `output_ids` but not in the text."""
    text: OutputText | None = None
    """The answer as text, with its stop strings. `None` without a tokenizer."""
    namespace: str = ""
    """Only requests of the same namespace share pages. Give each tenant its own."""

    token_ids: list[int] = dataclasses.field(init=False)
    seq: int | None = dataclasses.field(init=False, default=None)
    """While the request runs: id of the sequence that holds its pages."""
    known: Prompt | None = dataclasses.field(init=False, default=None)
    """While the request waits: the tokens to look up in the prefix index."""
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
        """The number of tokens so far, of prompt and answer."""
        return len(self.token_ids)

    @property
    def num_uncomputed(self) -> int:
        """The number of tokens whose K and V are not in pages. Computing the last of them gives the next token."""
        return self.num_tokens - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """True if only the newest token of the answer is left to compute."""
        return self.num_uncomputed == 1 and self.num_tokens > len(self.prompt_ids)

    @property
    def max_tokens(self) -> int:
        """The most tokens of prompt and answer."""
        return len(self.prompt_ids) + self.max_new_tokens

    def append(self, token_id: int) -> FinishReason | None:
        """Add the next token of the answer. Returns the reason if the answer ends with it, else None."""
        self.token_ids.append(token_id)
        if token_id in self.stop_token_ids:
            return "stop"
        if self.text is not None and self.text.push(token_id):
            return "stop"
        return "length" if self.num_tokens == self.max_tokens else None
