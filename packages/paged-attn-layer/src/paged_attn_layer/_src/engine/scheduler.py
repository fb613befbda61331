"""Which tokens are computed in the next step: continuous batching over a page pool, in plain Python."""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np

from paged_attn_layer._src.engine.request import FinishReason, Request, RequestState
from paged_cache import OutOfPages, PageManager, Prompt

Mode = Literal["prefill", "decode", "mixed"]
"""What a step computes: prompt tokens, the newest tokens of answers, or both."""


@dataclasses.dataclass(frozen=True)
class ScheduledRequest:
    """The part of one request that a step computes: tokens `start : start + q_len`, at the time it was scheduled."""

    request: Request
    start: int
    q_len: int
    is_decode: bool
    samples: bool
    """True if the last row gives the request's next token. In the middle of a prompt it gives nothing."""

    @property
    def token_ids(self) -> list[int]:
        """The tokens of the rows."""
        return self.request.token_ids[self.start : self.start + self.q_len]


@dataclasses.dataclass(frozen=True)
class ScheduledStep:
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
    def q_lens(self) -> np.ndarray:
        """Tokens of each part."""
        return np.array([part.q_len for part in self.work], np.int32)

    @property
    def token_ids(self) -> list[int]:
        """The tokens of all parts, one after another."""
        return [token for part in self.work for token in part.token_ids]

    @property
    def sampled(self) -> list[Request | None]:
        """The request of each part that samples; `None` for the others."""
        return [part.request if part.samples else None for part in self.work]

    @property
    def num_tokens(self) -> int:
        """Rows of the step."""
        return sum(part.q_len for part in self.work)

    @property
    def new_tokens(self) -> int:
        """Tokens that the step adds to answers."""
        return sum(part.samples for part in self.work)

    @property
    def decode_tokens(self) -> int:
        """Rows that are the newest token of an answer."""
        return sum(part.q_len for part in self.work if part.is_decode)

    @property
    def prefill_tokens(self) -> int:
        """Rows of prompts, and of answers that are computed again after a preemption."""
        return sum(part.q_len for part in self.work if not part.is_decode)

    @property
    def mode(self) -> Mode:
        """What the step computes: prompts, answers, or both."""
        if not self.prefill_tokens:
            return "decode"
        return "mixed" if self.decode_tokens else "prefill"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The requests that one step may change, and their tokens before it."""

    requests: tuple[Request, ...]
    """Oldest first."""
    num_tokens: tuple[int, ...]


class Scheduler:
    """First come, first served: decodes first, then prefill chunks, as pages and rows allow.

    Each step takes the running requests, oldest first. A request that decodes computes one token; its row is reserved
    before any prompt's. The others compute as much of their prompt as rows are left for; several may do so in one step.
    Then waiting requests are admitted, while their known tokens fit the pages that nobody has claimed. A request starts
    with the cached pages that hold its prefix. After each step, others can find the pages that it filled.

    Pages are taken as tokens need them, for all running requests at once. If there are too few, the youngest running
    request waits a step and keeps its pages. If there are still too few, it is preempted: it loses its pages, goes back
    to the front of the queue, and later computes again what is no longer cached.

    Layers with a window give pages back as it moves on (`PageManager.commit`), so a request is charged only for the
    pages that it can hold at once (`PageManager.pages_for`).

    Why every request finishes:

    1. `running + waiting` is always in order of arrival. Requests are admitted from the front of the queue, and the
       last one admitted goes back to the front.
    2. The oldest running request gets at least one row in every step: there are more rows than running requests, and
       all others may be preempted for its pages. Then every page is free or its own, and `check` made sure that these
       are enough. So it finishes after finitely many steps, and the next becomes the oldest.
    3. With nothing running, every page is free, and the front of the queue is admitted: it never needs more pages at
       once than `check` allowed.
    """

    def __init__(self, manager: PageManager, *, token_budget: int) -> None:
        """Schedule over the pages of `manager`, all of them free, and at most its `max_seqs` requests at once.

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
        """True if a request waits or runs."""
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
        pages = self.manager.pages_for(request.max_tokens, chunk=self.token_budget)
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

    def checkpoint(self) -> Checkpoint:
        """What `restart` needs to undo the next step: it admits at most `max_seqs` of the waiting requests."""
        requests = (*self.running, *itertools.islice(self.waiting, self.manager.max_seqs))
        return Checkpoint(requests, tuple(request.num_tokens for request in requests))

    def restart(self, manager: PageManager, checkpoint: Checkpoint) -> None:
        """Undo what was done since the checkpoint, wherever it broke off; all requests wait to be computed again.

        Args:
            manager: a new one, since the pages of the last one are lost.
            checkpoint: the state to go back to. If this call itself breaks off, it can be made again.
        """
        later = [r for r in self.waiting if r not in checkpoint.requests and r.state is RequestState.WAITING]
        for request, num_tokens in zip(checkpoint.requests, checkpoint.num_tokens, strict=True):
            request.rewind(num_tokens)
        self.manager = manager
        self.waiting = collections.deque([*checkpoint.requests, *later])
        self.running = []

    def schedule(self) -> ScheduledStep:
        """Decide the next step, and take the pages it needs."""
        work, num_preempted = self._rows_of_running(), 0
        while not self._take_pages(work):
            if work[-1].request is self.running[-1]:
                work = work[:-1]  # the youngest waits a step, and keeps what it has
            else:
                self._preempt(self.running[-1])
                num_preempted += 1
                work = self._rows_of_running()
        rows_left = self.token_budget - sum(part.q_len for part in work)
        cached_tokens = 0
        while rows_left and (admitted := self._admit(rows_left)):
            work.append(admitted)
            rows_left -= admitted.q_len
            cached_tokens += admitted.start
        return ScheduledStep(tuple(work), num_preempted, cached_tokens)

    def advance(self, step: ScheduledStep, next_tokens: Sequence[int]) -> list[Request]:
        """Take the results of a step; returns the requests that it finished, and frees their pages.

        A tokenizer that raises ends its own request only, with the reason "error".

        Args:
            step: what `schedule` returned.
            next_tokens: for each request of the step the token after its last row; looked at where it samples.
        """
        self.manager.commit(step.seqs, step.q_lens)
        finished = []
        for part, token in zip(step.work, next_tokens, strict=True):
            part.request.num_computed += part.q_len
            reason = part.request.append(token) if part.samples else None
            if reason is not None:
                self.finish(part.request, reason)
                finished.append(part.request)
        return finished

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End a request, between steps, and free its pages at once. A finished one stays as it is."""
        if request.state is RequestState.FINISHED:
            return
        request.end(reason)
        for queue in (self.running, self.waiting):
            if request in queue:
                queue.remove(request)
        self._release(request)

    def _rows_of_running(self) -> list[ScheduledRequest]:
        """What the running requests compute next: one row for each decode, then prompts in the rows that are left."""
        rows_left = self.token_budget - sum(request.is_decoding for request in self.running)
        work = []
        for request in self.running:
            q_len = 1 if request.is_decoding else min(request.num_uncomputed, rows_left)
            rows_left -= 0 if request.is_decoding else q_len
            if q_len:
                work.append(_part(request, q_len))
        return work

    def _take_pages(self, work: list[ScheduledRequest]) -> bool:
        """Give all parts the pages that they need, or none of them any and say so."""
        step = ScheduledStep(tuple(work))
        try:
            self.manager.extend(step.seqs, step.q_lens, step.token_ids)
        except OutOfPages:
            if len(self.running) == 1:
                raise  # cannot be: `check` has counted its pages
            return False
        return True

    def _admit(self, rows_left: int) -> ScheduledRequest | None:
        """Admit the next waiting request, if all its known tokens fit the unclaimed pages; returns what it computes."""
        if not self.waiting or len(self.running) == self.manager.max_seqs:
            return None
        request = self.waiting[0]
        if request.known is None:
            request.known = Prompt(request.token_ids, namespace=request.namespace)
        pages = self.manager.pages_to_admit(request.known, chunk=self.token_budget)
        if pages > self.manager.num_free - self._claimed_pages():
            return None
        request.seq = self.manager.admit(request.known, chunk=rows_left)
        request.known = None
        request.num_computed = int(self.manager.computed(request.seq)[0])
        request.state = RequestState.RUNNING
        self.running.append(self.waiting.popleft())
        return _part(request, int(self.manager.lengths(request.seq)[0]) - request.num_computed)

    def _claimed_pages(self) -> int:
        """Pages that running requests may still take for the tokens that they are known to have."""
        seqs = np.array([request.seq for request in self.running], np.int64)
        lengths = np.array([request.num_tokens for request in self.running], np.int64)
        return self.manager.pages_to_extend(seqs, lengths, chunk=self.token_budget)

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


def _part(request: Request, q_len: int) -> ScheduledRequest:
    samples = q_len == request.num_uncomputed
    return ScheduledRequest(request, request.num_computed, q_len, request.is_decoding, samples)
