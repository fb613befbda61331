"""Which tokens are computed in the next step: continuous batching over a page pool, in plain Python."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Literal

from paged_attn_layer.engine.request import FinishReason, Request, RequestState
from paged_cache import PagePool, Prefix, ScheduledSequence

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

    @property
    def sequence(self) -> ScheduledSequence:
        """The rows as the batch's builder takes them."""
        return ScheduledSequence(page_ids=self.request.page_ids, kv_len=self.start + self.rows, q_len=self.rows)


@dataclasses.dataclass(frozen=True)
class Step:
    """What one call of the model computes, oldest request first; empty when there is nothing to do."""

    work: tuple[ScheduledRequest, ...]
    num_preempted: int = 0
    """Requests that lost their pages to older ones for this step."""
    reused_tokens: int = 0
    """Tokens that the requests admitted for this step found computed in pages."""

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
    before any prompt's. The others compute as much of their prompt as rows and pages are left for, several in one
    step. Then waiting requests are admitted while their known tokens fit the pages that nobody has claimed. A request
    starts with the pages that already hold its prefix, and after each step others can find the pages that it filled.

    Pages are taken as tokens need them. A request that cannot get a page for even one token takes them from the
    youngest running request: that one is preempted, goes back to the front of the queue, and later computes again what
    it no longer finds. The youngest itself waits a step, and keeps what it has.

    Why every request finishes. (1) `running + waiting` is always in order of arrival: requests are admitted from the
    front of the queue, and the last one admitted goes back to the front. (2) The oldest running request gets at least
    one row in every step: there are more rows than slots, and when it lacks a page it may take those of all
    others. Then every page is free or its own, the shared ones included, and `check` has made sure that all pages are
    enough for it. So it finishes after finitely many steps, and the next becomes the oldest. (3) With nothing running,
    every page is free, and the front of the queue is admitted: what it finds and what it lacks are free pages, and
    together no more than `check` allowed.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        page_size: int,
        max_seqs: int,
        max_sequence_length: int,
        token_budget: int,
        prefix_reuse: bool = True,
    ) -> None:
        """Schedule over the pages of `pool`, all of them free.

        Args:
            pool: hands out pages of `page_size` tokens.
            page_size: tokens a page holds.
            max_seqs: requests that run at once.
            max_sequence_length: tokens of the longest request, its answer included.
            token_budget: rows of one step.
            prefix_reuse: whether requests share pages that hold the same prefix.

        Raises:
            ValueError: the budget leaves no row for prompts beside `max_seqs` decodes.
        """
        if token_budget <= max_seqs:
            raise ValueError(
                f"token_budget={token_budget} must exceed max_seqs={max_seqs}: "
                "each decode takes a row, and prompts need at least one"
            )
        self.pool = pool
        self.page_size = page_size
        self.max_seqs = max_seqs
        self.max_sequence_length = max_sequence_length
        self.token_budget = token_budget
        self.prefix_reuse = prefix_reuse
        self.num_pages = pool.num_free
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
        if request.max_tokens > self.max_sequence_length:
            raise ValueError(
                f"{asked} = {request.max_tokens} must be at most max_sequence_length={self.max_sequence_length}; "
                "shorten the prompt, ask for fewer tokens, or build the engine for longer sequences"
            )
        pages = self._pages_for(request.max_tokens)
        if pages > self.num_pages:
            raise ValueError(
                f"{asked} need {pages} pages of {self.page_size} tokens, more than the cache's {self.num_pages}; "
                "give the cache more pages"
            )

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: as `check`, or the request was added before.
        """
        if request.state is not RequestState.NEW:
            raise ValueError(f"the request was added before (it is {request.state.name}); make a new one")
        self.check(request)
        if self.prefix_reuse:
            request.prefix = Prefix(self.pool, self.page_size, request.cache_salt)
        request.state = RequestState.WAITING
        self.waiting.append(request)

    def schedule(self) -> Step:
        """Decide the next step, and take the pages it needs."""
        work: list[ScheduledRequest] = []
        rows_left = self.token_budget - sum(request.is_decoding for request in self.running)
        oldest_first = self.running.copy()
        for request in oldest_first:
            if request.state is RequestState.RUNNING:  # not preempted for an older one a moment ago
                rows_left += request.is_decoding  # the row that was set aside for it
                rows_left -= self._schedule_rows(request, rows_left, work)
        num_preempted = len(oldest_first) - len(self.running)
        reused_tokens = 0
        while rows_left and (request := self._admit()):
            reused_tokens += request.num_computed
            rows_left -= self._schedule_rows(request, rows_left, work)
        return Step(tuple(work), num_preempted, reused_tokens)

    def advance(self, step: Step, next_tokens: Sequence[int]) -> list[Request]:
        """Take the results of a step; returns the requests that it finished, their slots and pages free again.

        Args:
            step: what `schedule` returned.
            next_tokens: for each request of the step the token after its last row; looked at where it samples.
        """
        finished = []
        for part, token in zip(step.work, next_tokens, strict=True):
            part.request.num_computed += part.rows
            self._keep_pages(part.request, part.start)
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
        self._release_pages(request)
        request.state = RequestState.FINISHED
        request.finish_reason = reason

    def _schedule_rows(self, request: Request, rows_left: int, work: list[ScheduledRequest]) -> int:
        """Schedule what can be of a running request; returns the rows that this took of `rows_left`."""
        rows = self._take_pages(request, min(request.num_uncomputed, rows_left))
        if rows:
            samples = rows == request.num_uncomputed
            work.append(ScheduledRequest(request, request.num_computed, rows, request.is_decoding, samples))
        return rows

    def _take_pages(self, request: Request, wanted: int) -> int:
        """Give a request pages for `wanted` more tokens, or for as many as can be; returns how many."""
        if not wanted:
            return 0
        while not (room := self._room(request)) and self.running[-1] is not request:
            self._preempt(self.running[-1])
        rows = min(wanted, room)
        missing = self._pages_for(request.num_computed + rows) - len(request.page_ids)
        request.page_ids.extend(self.pool.allocate(missing))
        return rows

    def _room(self, request: Request) -> int:
        """Tokens that the request's own pages and the free ones have room for."""
        return (len(request.page_ids) + self.pool.num_free) * self.page_size - request.num_computed

    def _admit(self) -> Request | None:
        """Give the next waiting request a slot and its prefix, if all its known tokens fit the unclaimed pages."""
        if not self.waiting or len(self.running) == self.max_seqs:
            return None
        request = self.waiting[0]
        prefix = request.prefix.find(request.token_ids) if request.prefix else []
        claimed = sum(self._pages_for(request.num_tokens) - len(request.page_ids) for request in self.running)
        shared = sum(self.pool.ref_count(page) > 0 for page in prefix)  # these alone are not taken from the free ones
        if self._pages_for(request.num_tokens) - shared > self.pool.num_free - claimed:
            return None
        self.pool.share(prefix)
        request.page_ids = prefix
        request.num_computed = len(prefix) * self.page_size
        request.state = RequestState.RUNNING
        self.running.append(self.waiting.popleft())
        return request

    def _keep_pages(self, request: Request, start: int) -> None:
        """Let others find the pages that a request has filled from token `start` on."""
        if request.prefix:
            request.prefix.keep(request.page_ids, request.token_ids, start=start, end=request.num_computed)

    def _preempt(self, request: Request) -> None:
        """Take back the youngest running request's pages, and queue it as the next to be admitted."""
        self.running.remove(request)
        self._release_pages(request)
        request.num_computed = 0
        request.num_preemptions += 1
        request.state = RequestState.WAITING
        self.waiting.appendleft(request)

    def _release_pages(self, request: Request) -> None:
        self.pool.release(reversed(request.page_ids))  # the last page is the first to be evicted
        request.page_ids = []

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)
