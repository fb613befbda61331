"""Statistics of an engine: one record per step, and the totals and rates over all steps."""

import dataclasses
from collections import Counter

from paged_attn_layer._src.engine.scheduler import Mode


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One step. Times are in seconds."""

    mode: Mode
    prefill_tokens: int
    """Prompt tokens computed, and tokens computed again after a preemption."""
    cached_tokens: int
    """Cache hits of the requests admitted in this step: tokens found in pages."""
    decode_tokens: int
    """Tokens of answers computed, one for each decoding request."""
    new_tokens: int
    """Tokens that the step added to answers."""
    running: int
    """Requests that ran."""
    waiting: int
    """Requests that waited, because `max_seqs` were running or pages were missing."""
    pages_used: int
    """Pages in use while the step ran."""
    host_seconds: float
    """Time to schedule, to build the batch and to take the results."""
    device_seconds: float
    """Time from the call of the compiled step until its tokens are on the host."""

    @property
    def seconds(self) -> float:
        """The whole step's time."""
        return self.host_seconds + self.device_seconds


@dataclasses.dataclass
class EngineStats:
    """The steps since warm-up, and totals and rates over them.

    The time of a mixed step is divided by tokens: prefill gets `prefill_tokens / (prefill_tokens + decode_tokens)`.
    """

    steps: list[StepRecord] = dataclasses.field(default_factory=list)
    warm_up_seconds: float = 0.0
    warm_up_compilations: int = 0
    """Programs compiled by `warm_up`."""
    compilations: int = 0
    """Programs compiled by steps. 0 after a warm-up."""
    preemptions: int = 0
    """Number of times that a request lost its pages to an older one and had to be computed again."""

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens computed."""
        return sum(step.prefill_tokens for step in self.steps)

    @property
    def cached_tokens(self) -> int:
        """Cache hits: tokens of new or preempted requests that were found in pages and not computed."""
        return sum(step.cached_tokens for step in self.steps)

    @property
    def decode_tokens(self) -> int:
        """Tokens of answers computed."""
        return sum(step.decode_tokens for step in self.steps)

    @property
    def seconds(self) -> float:
        """Time of all steps."""
        return sum(step.seconds for step in self.steps)

    @property
    def prefill_seconds(self) -> float:
        """Time of prefill: its steps, and its share of mixed steps."""
        return sum(step.seconds * step.prefill_tokens / _tokens(step) for step in self.steps)

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second of prefill."""
        return _rate(self.prefill_tokens, self.prefill_seconds)

    @property
    def decode_rate(self) -> float:
        """Answer tokens per second of decode, over all requests."""
        return _rate(self.decode_tokens, self.seconds - self.prefill_seconds)

    @property
    def steps_by_mode(self) -> dict[Mode, int]:
        """The number of steps of each mode."""
        count = Counter(step.mode for step in self.steps)
        return {"prefill": count["prefill"], "mixed": count["mixed"], "decode": count["decode"]}

    @property
    def peak_pages(self) -> int:
        """Most pages in use at once."""
        return max((step.pages_used for step in self.steps), default=0)

    @property
    def host_microseconds(self) -> float:
        """Mean host time per step, in microseconds."""
        return 1e6 * _rate(sum(step.host_seconds for step in self.steps), len(self.steps))

    @property
    def device_microseconds(self) -> float:
        """Mean device time per step, in microseconds."""
        return 1e6 * _rate(sum(step.device_seconds for step in self.steps), len(self.steps))


def _tokens(step: StepRecord) -> int:
    return step.prefill_tokens + step.decode_tokens


def _rate(amount: float, per: float) -> float:
    return amount / per if per else 0.0
