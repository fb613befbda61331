"""What is measured, by names that say all of it; imports the standard library alone, for the peer reads it too."""

import dataclasses
import random
import re
import time
from collections.abc import Callable

PAGE_SIZE = 16
STEPS = PAGE_SIZE
"""Timed decode steps of a turn: each sequence fills one page in them, so a sixteenth of them fill one in a step.

As many come before them, untimed: a serving loop's steps follow each other, and the other contestant had the caches.
"""
PAGES_A_TURN = 1024
"""Pages that a turn of anything else touches, at least."""
_NAME = re.compile(r"(?:(decode)-(\d+)x|(admit|hit|churn|fork|swap)-)(\d+)-p(\d+)")
Turn = Callable[[], dict[str, float]]
"""One turn of a workload: seconds of each part, for one operation."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """One operation to measure.

    decode   one step of `seqs` running sequences, each between an eighth of `tokens` and `tokens` long
    admit    a prompt of `tokens` that nobody had before, its pages made findable, and released
    hit      a prompt of `tokens` whose pages are all found but for the last
    churn    as admit, but every free page of the pool holds findable content, which has to be evicted
    fork     a sequence of `tokens` forked, one new token for the fork, and the fork released
    swap     a sequence of `tokens` swapped out and in again
    """

    kind: str
    seqs: int
    tokens: int
    num_pages: int

    @classmethod
    def parse(cls, name: str) -> "Workload":
        """The workload of this name.

        >>> Workload.parse("decode-256x2048-p100000")
        Workload(kind='decode', seqs=256, tokens=2048, num_pages=100000)

        Raises:
            ValueError: the name is not one.
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
        """What `parse` reads."""
        seqs = f"{self.seqs}x" if self.kind == "decode" else ""
        return f"{self.kind}-{seqs}{self.tokens}-p{self.num_pages}"

    @property
    def pages_per_seq(self) -> int:
        """Entries of a row of the page table."""
        return self.tokens // PAGE_SIZE

    @property
    def times(self) -> int:
        """How often a turn does the operation while it is timed."""
        return STEPS if self.kind == "decode" else max(1, PAGES_A_TURN // self.pages_per_seq)

    @property
    def operations(self) -> int:
        """What a turn's time is divided by: its steps or forks, or else the pages that it touches."""
        return self.times * (1 if self.kind in ("decode", "fork") else self.pages_per_seq)

    @property
    def most_turns(self) -> int | None:
        """Turns until the first running sequence is full; None where turns leave nothing behind."""
        return (self.tokens - self.tokens // 8) // (2 * STEPS) - 1 if self.kind == "decode" else None

    def prompt(self, number: int) -> list[int]:
        """A prompt of the workload's length, unlike those of other numbers."""
        return tokens_of(number, self.tokens)

    def running(self, number: int) -> list[int]:
        """What a running sequence holds when decode starts; the lengths are spread, so that pages fill evenly."""
        return tokens_of(number, self.tokens // 8 + number % PAGE_SIZE)


def tokens_of(number: int, count: int) -> list[int]:
    """Random token ids."""
    return random.Random(number).choices(range(32_000), k=count)


class Laps:
    """Seconds by part: each call adds the time since the one before to the part it names.

    It is the thread's processor time. Bookkeeping waits for nothing, so on an idle machine the clock shows the same,
    and on a busy one this is disturbed least. What other threads or a device do is taken from the clock.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._last = self._now()

    def __call__(self, part: str | None = None, *, by_clock: bool = False) -> None:
        """Count the time since the last call to this part; to none, where the time is the harness's own."""
        now = self._now()
        if part is not None:
            self._seconds[part] = self._seconds.get(part, 0.0) + now[by_clock] - self._last[by_clock]
        self._last = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.thread_time(), time.perf_counter()

    def over(self, count: int) -> dict[str, float]:
        """The mean over so many operations."""
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
