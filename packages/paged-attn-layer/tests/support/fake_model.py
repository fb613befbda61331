"""A model without weights: its next token is a hash of all tokens that it finds in a sequence's pages."""

import zlib

from paged_attn_layer.engine.scheduler import Scheduler, Step

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

    def __init__(self, page_size):
        self.page_size = page_size
        self.slots = {}

    def __call__(self, step: Step):
        sequences = [part.sequence for part in step.work]
        for part, sequence in zip(step.work, sequences, strict=True):
            first = sequence.kv_len - sequence.q_len
            for position, token in enumerate(part.token_ids, first):
                self.slots[self._slot(sequence, position)] = token
        return [next_token([self.slots[self._slot(s, p)] for p in range(s.kv_len)]) for s in sequences]

    def _slot(self, sequence, position):
        return sequence.page_ids[position // self.page_size], position % self.page_size


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
