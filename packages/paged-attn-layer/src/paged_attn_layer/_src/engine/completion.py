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
    prompt_tokens: int
    """The number of tokens of the prompt, with the chat template."""

    @classmethod
    def of(cls, request: Request) -> "Completion":
        """Returns the answer of a finished request."""
        if request.finish_reason is None:
            raise ValueError("the request has not finished; call Engine.step until it has")
        return cls(
            text="" if request.text is None else request.text.value,
            token_ids=request.output_ids,
            finish_reason=request.finish_reason,
            prompt_tokens=len(request.prompt_ids),
        )
