"""How the tokens of an answer are chosen, and what ends it."""

import dataclasses
import secrets
from collections.abc import Collection, Mapping
from typing import Any

from paged_attn_layer._src.engine import checks

MAX_BIASED_TOKENS = 320
"""Most tokens of one request that have a bias or may not be chosen. It is the width of an array on the device."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of an answer are chosen, and what ends it. The default is greedy: the likeliest token.

    Logits are changed in this order: `logit_bias`, `repetition_penalty`, `frequency_penalty`, `presence_penalty`,
    `temperature`, `top_k`, `top_p`, `min_p`.

    Raises:
        ValueError: a field is of another type or out of its range; the message names it.
    """

    temperature: float = 0.0
    """Divides the logits. 0: the likeliest token is chosen. 1: the model's own distribution."""
    top_k: int = 0
    """Only the `top_k` likeliest tokens can be chosen, and those as likely as the last of them. 0: all can."""
    top_p: float = 1.0
    """Only the likeliest tokens can be chosen: the fewest whose probabilities add up to `top_p`."""
    min_p: float = 0.0
    """Only tokens can be chosen that are at least `min_p` times as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens in prompt and answer, and multiplies the negative ones. Above 0."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the answer has. -2 to 2."""
    frequency_penalty: float = 0.0
    """Subtracted from the logits of tokens that the answer has, once for each time. -2 to 2."""
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict, hash=False)
    """Added to the logits of these tokens. -100 to 100."""
    seed: int | None = None
    """Equal seeds give equal answers, whatever else is served. `None`: a new one for each request. Below 2**32."""
    max_new_tokens: int = 64
    """Most tokens of the answer."""
    min_new_tokens: int = 0
    """Tokens that the answer must have before a stop token can be chosen. A stop string ends it all the same."""
    stop: str | Collection[str] = ()
    """The answer ends before the first of these strings (or this one). They may name special tokens, which are no part
    of the answer's text."""
    stop_token_ids: Collection[int] = ()
    """Tokens that end the answer, beside the model's end tokens."""
    ignore_end_tokens: bool = False
    """True if the model's end tokens do not end the answer."""

    def __post_init__(self) -> None:
        for name, (least, most) in _RANGES.items():
            self._set(name, checks.real_number(name, getattr(self, name), least, most))
        for name in ("top_p", "repetition_penalty"):
            if not getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        for name, least in {"top_k": 0, "max_new_tokens": 1, "min_new_tokens": 0}.items():
            self._set(name, checks.whole_number(name, getattr(self, name), least))
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} must be at most max_new_tokens={self.max_new_tokens}"
            )
        if self.seed is not None:
            self._set("seed", checks.whole_number("seed", self.seed, 0))
            if self.seed >= 2**32:
                raise ValueError(f"seed={self.seed} must be below 2**32")
        self._set("logit_bias", _checked_bias(self.logit_bias))
        self._set("stop", checks.stop_strings(self.stop))
        self._set("stop_token_ids", tuple(checks.token_ids("stop_token_ids", self.stop_token_ids, ordered=False)))
        if not isinstance(self.ignore_end_tokens, bool):
            raise ValueError(f"ignore_end_tokens={self.ignore_end_tokens!r} must be True or False")

    @property
    def is_greedy(self) -> bool:
        """True if the likeliest token is chosen."""
        return self.temperature == 0

    @property
    def adjusts(self) -> bool:
        """True if logits are changed by what a token is, or by the tokens before it."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0) or bool(self.logit_bias) or self.min_new_tokens > 0

    def seeded(self) -> "SamplingParams":
        """Returns these, with a seed drawn if there is none."""
        return self if self.seed is not None else dataclasses.replace(self, seed=secrets.randbits(32))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


_RANGES = {
    "temperature": (0.0, 1e6),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.0, 1e6),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}


def _checked_bias(bias: Any) -> dict[int, float]:
    if not isinstance(bias, Mapping):
        raise ValueError(f"logit_bias={bias!r} must be a dict from token ids to numbers")
    if len(bias) > MAX_BIASED_TOKENS:
        raise ValueError(f"logit_bias has {len(bias)} tokens; it must have at most {MAX_BIASED_TOKENS}")
    ids = checks.token_ids("logit_bias", bias.keys(), ordered=False)
    values = [checks.real_number(f"logit_bias[{token}]", value, -100, 100) for token, value in bias.items()]
    return dict(zip(ids, values, strict=True))


def params_of(
    sampling: SamplingParams | None,
    max_new_tokens: int | None,
    stop: str | Collection[str] | None,
    stop_token_ids: Collection[int] | None,
    ignore_end_tokens: bool | None,
) -> SamplingParams:
    """Returns `sampling`, or the params with these fields if it is `None`. A field that is `None` was not given.

    Raises:
        ValueError: a field is given beside `sampling`.
    """
    fields = {
        "max_new_tokens": max_new_tokens,
        "stop": stop,
        "stop_token_ids": stop_token_ids,
        "ignore_end_tokens": ignore_end_tokens,
    }
    given: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
    if sampling is None:
        return SamplingParams(**given)
    if not isinstance(sampling, SamplingParams):
        raise ValueError(f"sampling={sampling!r} must be SamplingParams")
    for name, value in given.items():
        raise ValueError(f"{name}={value!r} is given beside sampling; give it there, as SamplingParams({name}=...)")
    return sampling
