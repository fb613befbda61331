"""The workloads and their names. Imports only the standard library, because vLLM's process imports it too."""

import dataclasses
import random
import re
import time
from collections.abc import Callable

PAGE_SIZE = 16
STEPS = PAGE_SIZE
"""Timed decode steps of a turn. Each sequence fills one page in them, so a sixteenth of all sequences in each step.

The same number of untimed steps comes first. They bring our data back into the processor's caches, where the other
contestant's turn had replaced it. In a serving loop one step follows the other, so the data would be there.
"""
PAGES_A_TURN = 1024
"""The least number of pages that a turn of any other workload touches."""
_NAME = re.compile(r"(?:(decode)-(\d+)x|(admit|hit|churn|fork|swap)-)(\d+)-p(\d+)")
Turn = Callable[[], dict[str, float]]
"""A function that runs one turn of a workload. It returns the seconds of each part, for one operation."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """One operation to measure.

    decode   one step of `seqs` running sequences, each between `tokens / 8` and `tokens` long
    admit    admit a new prompt of `tokens`, index its pages, and release it
    hit      the same for a prompt of `tokens` whose pages are all cached, except the last
    churn    as admit, but every free page of the pool is cached, so that pages are evicted
    fork     fork a sequence of `tokens`, add one token to the fork, and release the fork
    swap     swap a sequence of `tokens` out and in again
    """

    kind: str
    seqs: int
    tokens: int
    num_pages: int

    @classmethod
    def parse(cls, name: str) -> "Workload":
        """Returns the workload of this name.

        >>> Workload.parse("decode-256x2048-p100000")
        Workload(kind='decode', seqs=256, tokens=2048, num_pages=100000)

        Raises:
            ValueError: there is no such workload.
        """
        found = _NAME.fullmatch(name)
        if found is None:
            raise ValueError(
                f"workload {name!r} must be named decode-SEQSxTOKENS-pPAGES, such as decode-256x2048-p100000, or "
                "KIND-TOKENS-pPAGES, where KIND is admit, hit, churn, fork or swap"
            )
        decode, seqs, other, tokens, pages = found.groups()
        return cls(decode or other, int(seqs or 1), int(tokens), int(pages))

    @property
    def name(self) -> str:
        """The name that `parse` reads."""
        seqs = f"{self.seqs}x" if self.kind == "decode" else ""
        return f"{self.kind}-{seqs}{self.tokens}-p{self.num_pages}"

    @property
    def pages_per_seq(self) -> int:
        """Length of each row of the page table."""
        return self.tokens // PAGE_SIZE

    @property
    def times(self) -> int:
        """The number of timed operations in a turn."""
        return STEPS if self.kind == "decode" else max(1, PAGES_A_TURN // self.pages_per_seq)

    @property
    def operations(self) -> int:
        """A turn's time is divided by this: its steps or forks, or else the pages that it touches."""
        return self.times * (1 if self.kind in ("decode", "fork") else self.pages_per_seq)

    @property
    def most_turns(self) -> int | None:
        """Turns until the first running sequence is full. None if turns do not make sequences longer."""
        return (self.tokens - self.tokens // 8) // (2 * STEPS) - 1 if self.kind == "decode" else None

    def prompt(self, number: int) -> list[int]:
        """Returns a prompt of the workload's length. Each number has its own."""
        return tokens_of(number, self.tokens)

    def running(self, number: int) -> list[int]:
        """Returns the tokens of a running sequence before decode. The lengths differ, so that pages fill evenly."""
        return tokens_of(number, self.tokens // 8 + number % PAGE_SIZE)


def tokens_of(number: int, count: int) -> list[int]:
    """Returns `count` random token ids."""
    return random.Random(number).choices(range(32_000), k=count)


class Laps:
    """A stopwatch: each call adds the time since the last call to the part that it names.

    The time is processor time of the thread. Bookkeeping never waits, so on an idle machine the clock would show the
    same. Other programs disturb processor time least. Work of other threads or of a device is timed by the clock.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._last = self._now()

    def __call__(self, part: str | None = None, *, by_clock: bool = False) -> None:
        """Add the time since the last call to this part. Without a part, drop it."""
        now = self._now()
        if part is not None:
            self._seconds[part] = self._seconds.get(part, 0.0) + now[by_clock] - self._last[by_clock]
        self._last = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.thread_time(), time.perf_counter()

    def over(self, count: int) -> dict[str, float]:
        """Returns the seconds of each part, divided by `count`."""
        return {part: seconds / count for part, seconds in self._seconds.items()}


DEFAULT = (
    *(f"decode-{seqs}x2048-p1000000" for seqs in (64, 256, 1024, 4096)),
    *(f"decode-256x{tokens}-p1000000" for tokens in (8192, 32768)),
    *(f"decode-256x512-p{pages}" for pages in (10_000, 100_000, 1_000_000)),
    *(f"{kind}-{tokens}-p100000" for kind in ("admit", "hit") for tokens in (1024, 8192, 32768)),
    *(f"churn-1024-p{pages}" for pages in (10_000, 100_000, 1_000_000)),
    *(f"fork-{tokens}-p100000" for tokens in (2048, 32768)),
    *(f"swap-{tokens}-p100000" for tokens in (2048, 32768)),
)
