"""One request: a prompt to answer, and the answer so far."""

import dataclasses
import enum
import math
from collections.abc import Collection
from typing import Literal

from paged_attn_layer._src.engine import checks
from paged_attn_layer._src.engine.params import MAX_BIASED_TOKENS, SamplingParams
from paged_attn_layer._src.engine.text import OutputText
from paged_cache import Prompt

FinishReason = Literal["stop", "length", "aborted", "error"]
"""Why an answer ended: by a stop token or stop string, at `max_new_tokens`, by `Engine.abort`, or because its tokens
could not be turned into text (`Request.error` says why)."""


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
        ValueError: the prompt is empty, a number is no whole number, or `max_new_tokens` is less than 1; or the
            namespace is no text.
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
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    """How tokens are chosen. A request without a seed draws one here. What ends the answer is in the fields above."""

    token_ids: list[int] = dataclasses.field(init=False)
    seq: int | None = dataclasses.field(init=False, default=None)
    """While the request runs: id of the sequence that holds its pages."""
    known: Prompt | None = dataclasses.field(init=False, default=None)
    """While the request waits: the tokens to look up in the prefix index."""
    num_computed: int = dataclasses.field(init=False, default=0)
    num_preemptions: int = dataclasses.field(init=False, default=0)
    state: RequestState = dataclasses.field(init=False, default=RequestState.NEW)
    finish_reason: FinishReason | None = dataclasses.field(init=False, default=None)
    error: Exception | None = dataclasses.field(init=False, default=None)
    """What the tokenizer raised, if that ended the answer."""
    answer: str = dataclasses.field(init=False, default="")
    """The text of a finished request, without its stop string. Empty without a tokenizer."""

    def __post_init__(self) -> None:
        self.prompt_ids = checks.token_ids("the prompt", self.prompt_ids)
        if not self.prompt_ids:
            raise ValueError("the prompt is empty; it must have at least one token")
        self.max_new_tokens = checks.whole_number("max_new_tokens", self.max_new_tokens, 1)
        self.stop_token_ids = frozenset(checks.token_ids("stop_token_ids", self.stop_token_ids, ordered=False))
        checks.text("namespace", self.namespace)
        self.sampling = self.sampling.seeded()
        biased = {*self.sampling.logit_bias, *(self.stop_token_ids if self.sampling.min_new_tokens else ())}
        if len(biased) > MAX_BIASED_TOKENS:
            raise ValueError(
                f"logit_bias and the stop tokens that min_new_tokens={self.sampling.min_new_tokens} excludes are "
                f"{len(biased)} tokens; they must be at most {MAX_BIASED_TOKENS}"
            )
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

    def biases(self) -> dict[int, float]:
        """Returns what is added to the logits of the next token; -inf for a token that must not be chosen."""
        too_short = self.num_tokens - len(self.prompt_ids) < self.sampling.min_new_tokens
        return {**self.sampling.logit_bias, **dict.fromkeys(self.stop_token_ids if too_short else (), -math.inf)}

    def append(self, token_id: int) -> FinishReason | None:
        """Add the next token of the answer. Returns the reason if the answer ends with it, else None.

        A tokenizer that raises ends this answer, and no other: the exception goes to `error`.
        """
        self.token_ids.append(token_id)
        try:
            if self._stops_at(token_id):
                return "stop"
        except Exception as error:
            self.error = error
            return "error"
        return "length" if self.num_tokens == self.max_tokens else None

    def _stops_at(self, token_id: int) -> bool:
        """Add the token to the text. True if it, or a stop string that it completes, ends the answer."""
        if token_id in self.stop_token_ids:
            if self.text is not None:
                self.text.end(token_id)
            return True
        return self.text is not None and self.text.push(token_id)

    def end(self, reason: FinishReason) -> None:
        """Finish with the text so far; the reason is "error" if the tokenizer cannot give it."""
        if self.text is not None:
            try:
                if reason != "error" and self.text.finish() and reason == "length":
                    reason = "stop"
                self.answer = self.text.settled if reason == "error" else self.text.value
            except Exception as error:
                self.answer, self.error, reason = self.text.settled, error, "error"
        self.finish_reason = reason
        self.state = RequestState.FINISHED

    def rewind(self, num_tokens: int) -> None:
        """Wait with only the first `num_tokens` tokens, all of them to be computed again."""
        del self.token_ids[num_tokens:]
        if self.text is not None:
            text = self.text.restarted()
            for token_id in self.output_ids:
                text.push(token_id)
            self.text = text
        self.seq = self.known = self.finish_reason = self.error = None
        self.answer, self.num_computed = "", 0
        self.state = RequestState.WAITING
