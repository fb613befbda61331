"""A scheduler in a few lines: first come, first served, prompts in chunks, the youngest is preempted."""

import dataclasses
from collections import deque

from paged_cache._src.manager import OutOfPages, PageManager


@dataclasses.dataclass
class Request:
    """A prompt and an answer, whose tokens are known beforehand."""

    token_ids: list[int]
    prompt: int
    seq: int = -1
    known: int = 0
    """Tokens of the prompt, and of the answer so far."""
    computed: int = 0

    def __post_init__(self):
        self.known = self.prompt

    @property
    def is_done(self):
        return self.computed == len(self.token_ids)


class SmallScheduler:
    """Takes requests for which `pages_for` is at most all pages; admits by `pages_to_admit` and `pages_to_extend`."""

    def __init__(self, manager: PageManager, requests: list[Request], chunk: int):
        self.manager, self.chunk = manager, chunk
        self.waiting, self.running = deque(requests), list[Request]()
        self.preemptions = 0
        for request in requests:
            assert manager.pages_for(len(request.token_ids), chunk=chunk) <= manager.num_pages - 1

    def run(self) -> int:
        """Serve all requests; the number of steps."""
        steps = 0
        while self.waiting or self.running:
            self.step()
            steps += 1
            assert steps <= 10_000, "requests wait for each other"
        return steps

    def step(self):
        while not self._extend():
            assert len(self.running) > 1, "the oldest sequence runs out of pages"
            self._preempt(self.running[-1])
        self._admit()
        self._compute()

    def _extend(self) -> bool:
        """Slots for each running request's next tokens; whether there are pages for all of them."""
        counts = [min(self.chunk, request.known - request.computed) for request in self.running]
        new = zip(self.running, counts, strict=True)
        tokens = [token for each, n in new for token in each.token_ids[each.computed : each.computed + n]]
        try:
            self.manager.extend([request.seq for request in self.running], counts, tokens)
        except OutOfPages:
            return False
        return True

    def _preempt(self, request):
        self.manager.release(request.seq)
        request.computed = 0
        self.running.remove(request)
        self.waiting.appendleft(request)
        self.preemptions += 1

    def _admit(self):
        while self.waiting and len(self.running) < self.manager.max_seqs:
            request = self.waiting[0]
            known = request.token_ids[: request.known]
            if self.manager.pages_to_admit(known, chunk=self.chunk) > self.manager.num_free - self._claimed():
                break
            request.seq = self.manager.admit(known, chunk=self.chunk)
            request.computed = int(self.manager.computed(request.seq)[0])
            self.running.append(self.waiting.popleft())
        assert self.running, "nothing runs, and the oldest request is not admitted"

    def _claimed(self) -> int:
        """Pages that running requests need for the tokens that they are known to have."""
        seqs = [request.seq for request in self.running]
        return self.manager.pages_to_extend(seqs, [request.known for request in self.running], chunk=self.chunk)

    def _compute(self):
        """Commit the slots of this step; whoever has none left gets its next token."""
        for request in list(self.running):
            length = int(self.manager.lengths(request.seq)[0])
            self.manager.commit(request.seq, length - request.computed)
            request.computed = length
            request.known = min(max(request.known, length + 1), len(request.token_ids))
            if request.is_done:
                self.manager.release(request.seq)
                self.running.remove(request)
