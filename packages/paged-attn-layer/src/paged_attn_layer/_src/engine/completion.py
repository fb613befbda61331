"""The answer to one prompt."""

import dataclasses

from paged_attn_layer._src.engine.request import FinishReason, Request


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
    """The answer to one prompt."""

    text: str
    """The answer without its stop string or stop token. Empty without a tokenizer."""
    token_ids: list[int]
    """All tokens of the answer, with those that ended it."""
    finish_reason: FinishReason
    """ "error" if the tokenizer could not turn the tokens into text; `error` says why."""
    prompt_tokens: int
    """The number of tokens of the prompt, with the chat template."""
    error: str | None = None
    """What the tokenizer raised, if `finish_reason` is "error". The text is what was decoded before."""

    @classmethod
    def of(cls, request: Request) -> "Completion":
        """Returns the answer of a finished request."""
        if request.finish_reason is None:
            raise ValueError("the request has not finished; call Engine.step until it has")
        return cls(
            text=request.answer,
            token_ids=request.output_ids,
            finish_reason=request.finish_reason,
            prompt_tokens=len(request.prompt_ids),
            error=None if request.error is None else f"{type(request.error).__name__}: {request.error}",
        )
