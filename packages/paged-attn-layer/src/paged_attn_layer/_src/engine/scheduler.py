"""Which tokens are computed in the next step: continuous batching over a page pool, in plain Python."""

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal, TypeVar

import numpy as np

from paged_attn_layer._src.engine.request import FinishReason, Request, RequestState
from paged_cache import OutOfPages, PageManager, Prompt

Count = TypeVar("Count", int, np.ndarray)
Mode = Literal["prefill", "decode", "mixed"]
"""What a step computes: prompt tokens, the newest tokens of answers, or both."""


@dataclasses.dataclass(frozen=True)
class ScheduledRequest:
    """The part of one request that a step computes: tokens `start : start + rows`, at the time it was scheduled."""

    request: Request
    start: int
    rows: int
    is_decode: bool
    samples: bool
    """Whether the last row gives the request's next token; in the middle of a prompt it gives nothing."""

    @property
    def token_ids(self) -> list[int]:
        """The tokens of the rows."""
        return self.request.token_ids[self.start : self.start + self.rows]


@dataclasses.dataclass(frozen=True)
class Step:
    """What one call of the model computes, oldest request first; empty when there is nothing to do."""

    work: tuple[ScheduledRequest, ...]
    num_preempted: int = 0
    """Requests that lost their pages to older ones for this step."""
    cached_tokens: int = 0
    """Tokens that the requests admitted for this step found computed in pages."""

    @functools.cached_property
    def seqs(self) -> np.ndarray:
        """The page manager's sequence of each part."""
        return np.array([part.request.seq for part in self.work], np.int64)

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """Rows of each part."""
        return np.array([part.rows for part in self.work], np.int32)

    @property
    def token_ids(self) -> list[int]:
        """Tokens of all rows, one part's after another's."""
        return [token for part in self.work for token in part.token_ids]

    @property
    def num_tokens(self) -> int:
        """Rows of the step."""
        return sum(part.rows for part in self.work)

    @property
    def new_tokens(self) -> int:
        """Tokens that the step adds to answers."""
        return sum(part.samples for part in self.work)

    @property
    def decode_tokens(self) -> int:
        """Rows that are the newest token of an answer."""
        return sum(part.rows for part in self.work if part.is_decode)

    @property
    def prefill_tokens(self) -> int:
        """Rows of prompts, and of answers that are computed again after a preemption."""
        return sum(part.rows for part in self.work if not part.is_decode)

    @property
    def mode(self) -> Mode:
        """Whether prompts, answers or both are computed."""
        if not self.prefill_tokens:
            return "decode"
        return "mixed" if self.decode_tokens else "prefill"


class Scheduler:
    """First come, first served: decodes first, then chunks of prompts, as pages and rows allow.

    Each step takes the running requests, oldest first. A decoding one computes one token; its row is set aside
    before any prompt's. The others compute as much of their prompt as rows are left for, several in one step. Then
    waiting requests are admitted while their known tokens fit the pages that nobody has claimed. A request starts with
    the pages that already hold its prefix, and after each step others can find the pages that it filled.

    Pages are taken as tokens need them, for all running requests at once. Where they do not suffice, the youngest
    running request waits a step, and keeps what it has. Where they do not suffice even so, it is preempted: it goes
    back to the front of the queue, and later computes again what it no longer finds in pages.

    Why every request finishes. (1) `running + waiting` is always in order of arrival: requests are admitted from the
    front of the queue, and the last one admitted goes back to the front. (2) The oldest running request gets at least
    one row in every step: there are more rows than slots, and all others may be preempted for its pages. Then every
    page is free or its own, and `check` has made sure that all pages are enough for it. So it finishes after finitely
    many steps, and the next becomes the oldest. (3) With nothing running, every page is free, and the front of the
    queue is admitted: what it finds and what it lacks are free pages, and together no more than `check` allowed.
    """

    def __init__(self, manager: PageManager, *, token_budget: int) -> None:
        """Schedule over the pages of `manager`, all of them free, and as many sequences as it has room for.

        Args:
            manager: gives requests their pages.
            token_budget: rows of one step.

        Raises:
            ValueError: the budget leaves no row for prompts beside a decode for each of the manager's `max_seqs`.
        """
        if token_budget <= manager.max_seqs:
            raise ValueError(
                f"token_budget={token_budget} must exceed max_seqs={manager.max_seqs}: "
                "each decode takes a row, and prompts need at least one"
            )
        self.manager = manager
        self.token_budget = token_budget
        self.waiting: collections.deque[Request] = collections.deque()
        self.running: list[Request] = []

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self.waiting or self.running)

    def check(self, request: Request) -> None:
        """Refuse a request that could never finish; nothing is taken.

        Raises:
            ValueError: prompt and answer are longer than the longest sequence, or need more pages than there are.
        """
        asked = f"prompt of {len(request.prompt_ids)} tokens + max_new_tokens={request.max_new_tokens}"
        if request.max_tokens > self.manager.max_sequence_length:
            raise ValueError(
                f"{asked} = {request.max_tokens} must be at most "
                f"max_sequence_length={self.manager.max_sequence_length}; "
                "shorten the prompt, ask for fewer tokens, or build the engine for longer sequences"
            )
        pages = self._pages_for(request.max_tokens)
        if pages > self.manager.num_pages - 1:
            raise ValueError(
                f"{asked} need {pages} pages of {self.manager.page_size} tokens, more than the cache's "
                f"{self.manager.num_pages - 1}; give the cache more pages"
            )

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: as `check`, or the request was added before.
        """
        if request.state is not RequestState.NEW:
            raise ValueError(f"the request was added before (it is {request.state.name}); make a new one")
        self.check(request)
        request.state = RequestState.WAITING
        self.waiting.append(request)

    def schedule(self) -> Step:
        """Decide the next step, and take the pages it needs."""
        work, num_preempted = self._rows_of_running(), 0
        while not self._take_pages(work):
            if work[-1].request is self.running[-1]:
                work = work[:-1]  # the youngest waits a step, and keeps what it has
            else:
                self._preempt(self.running[-1])
                num_preempted += 1
                work = self._rows_of_running()
        rows_left = self.token_budget - sum(part.rows for part in work)
        cached_tokens = 0
        while rows_left and (admitted := self._admit(rows_left)):
            work.append(admitted)
            rows_left -= admitted.rows
            cached_tokens += admitted.start
        return Step(tuple(work), num_preempted, cached_tokens)

    def advance(self, step: Step, next_tokens: Sequence[int]) -> list[Request]:
        """Take the results of a step; returns the requests that it finished, their slots and pages free again.

        Args:
            step: what `schedule` returned.
            next_tokens: for each request of the step the token after its last row; looked at where it samples.
        """
        self.manager.commit(step.seqs, step.rows)
        finished = []
        for part, token in zip(step.work, next_tokens, strict=True):
            part.request.num_computed += part.rows
            reason = part.request.append(token) if part.samples else None
            if reason is not None:
                self.finish(part.request, reason)
                finished.append(part.request)
        return finished

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request, between steps, and free its slot and pages at once; nothing happens to a finished one."""
        if request.state is RequestState.FINISHED:
            return
        if request.state is RequestState.RUNNING:
            self.running.remove(request)
        elif request.state is RequestState.WAITING:
            self.waiting.remove(request)
        self._release(request)
        request.state = RequestState.FINISHED
        request.finish_reason = reason

    def _rows_of_running(self) -> list[ScheduledRequest]:
        """What the running requests compute next: a row for each decode, and the others' prompts in the rows left."""
        rows_left = self.token_budget - sum(request.is_decoding for request in self.running)
        work = []
        for request in self.running:
            rows = 1 if request.is_decoding else min(request.num_uncomputed, rows_left)
            rows_left -= 0 if request.is_decoding else rows
            if rows:
                work.append(_part(request, rows))
        return work

    def _take_pages(self, work: list[ScheduledRequest]) -> bool:
        """Give all parts the pages that they need, or none of them any and say so."""
        step = Step(tuple(work))
        try:
            self.manager.extend(step.seqs, step.rows, step.token_ids)
        except OutOfPages:
            if len(self.running) == 1:
                raise  # cannot be: `check` has counted its pages
            return False
        return True

    def _admit(self, rows_left: int) -> ScheduledRequest | None:
        """Give the next waiting request a slot, and what it computes, if all its tokens fit the unclaimed pages."""
        if not self.waiting or len(self.running) == self.manager.max_seqs:
            return None
        request = self.waiting[0]
        if request.known is None:
            request.known = Prompt(request.token_ids, namespace=request.namespace)
        if self.manager.pages_to_admit(request.known) > self.manager.num_free - self._claimed_pages():
            return None
        request.seq = self.manager.admit(request.known, chunk=rows_left)
        request.known = None
        request.num_computed = int(self.manager.computed(request.seq)[0])
        request.state = RequestState.RUNNING
        self.running.append(self.waiting.popleft())
        return _part(request, int(self.manager.lengths(request.seq)[0]) - request.num_computed)

    def _claimed_pages(self) -> int:
        """Pages that running requests still need for the tokens that they are known to have."""
        seqs = np.array([request.seq for request in self.running], np.int64)
        tokens = np.array([request.num_tokens for request in self.running], np.int64)
        return int((self._pages_for(tokens) - self._pages_for(self.manager.lengths(seqs))).sum())

    def _preempt(self, request: Request) -> None:
        """Take back a running request's pages, and queue it as the next to be admitted."""
        self.running.remove(request)
        self._release(request)
        request.num_computed = 0
        request.num_preemptions += 1
        request.state = RequestState.WAITING
        self.waiting.appendleft(request)

    def _release(self, request: Request) -> None:
        if request.seq is not None:
            self.manager.release(request.seq)
            request.seq = None

    def _pages_for(self, tokens: Count) -> Count:
        return -(-tokens // self.manager.page_size)


def _part(request: Request, rows: int) -> ScheduledRequest:
    samples = rows == request.num_uncomputed
    return ScheduledRequest(request, request.num_computed, rows, request.is_decoding, samples)
