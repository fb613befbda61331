"""A model without weights: its next token is a hash of all tokens that it finds in a sequence's pages."""

import zlib

from paged_attn_layer._src.engine.scheduler import ScheduledStep, Scheduler

VOCABULARY = 50


def next_token(tokens):
    return zlib.crc32(bytes(tokens)) % VOCABULARY


def answer(prompt, max_new_tokens, stop_token_ids=()):
    """What a request must get, computed with no batch and no pages."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_new_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] in stop_token_ids:
            break
    return tokens[len(prompt) :]


class FakeModel:
    """Keeps tokens where a real one keeps keys and values, so a page with two owners changes what it says."""

    def __init__(self, manager):
        self.manager = manager
        self.slots = {}

    def __call__(self, step: ScheduledStep):
        for moves in self.manager.take_moves():
            self._copy(moves.copy_from.tolist(), moves.copy_to.tolist())
        (tables,) = self.manager.page_tables(step.seqs).tolist()
        for part, table in zip(step.work, tables, strict=True):
            for position, token in enumerate(part.token_ids, part.start):
                self.slots[self._slot(table, position)] = token
        ends = [part.start + part.q_len for part in step.work]
        return [
            next_token([self.slots[self._slot(table, p)] for p in range(end)])
            for table, end in zip(tables, ends, strict=True)
        ]

    def _copy(self, sources, targets):
        slots = range(self.manager.page_size)
        pages = [[self.slots.get((page, slot)) for slot in slots] for page in sources]
        self.slots |= {
            (page, slot): token for page, held in zip(targets, pages, strict=True) for slot, token in enumerate(held)
        }

    def _slot(self, table, position):
        return table[position // self.manager.page_size], position % self.manager.page_size


def drain(scheduler: Scheduler, model: FakeModel, *, most_steps: int = 10_000, look=lambda step: None):
    """Serve until nothing is left; every step must do something."""
    finished = []
    for _ in range(most_steps):
        if not scheduler.has_work:
            return finished
        step = scheduler.schedule()
        assert step.work, "a step without work while requests wait is spinning"
        look(step)
        finished += scheduler.advance(step, model(step))
    raise AssertionError("requests are still unfinished")
