"""Random calls of a page manager (a given random seed), and a digest of all its results."""

import hashlib
import random

from paged_cache import LayerGroup, OutOfPages, PageManager, Prompt

MAX_SEQS, LONGEST = 6, 24


class RandomCalls:
    """Sequences of few different tokens, so that many prefixes are hits; more of them than there are pages."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.digest = hashlib.sha256()
        groups = (LayerGroup.full(), LayerGroup.window(6))
        sizes = {"max_seqs": MAX_SEQS, "max_sequence_length": LONGEST, "num_host_pages": 12}
        self.manager = PageManager(28, 4, groups=groups, scrub=True, **sizes)
        self.manager.subscribe(lambda events: self.note(*events))
        self.running, self.swapped = [], []

    def make(self, n):
        """Make `n` calls."""
        for _ in range(n):
            try:
                self.rng.choice(self.possible())()
            except OutOfPages as refusal:
                self.note(refusal)
            for moves in self.manager.take_moves():
                self.note(*(pages.tolist() for pages in vars(moves).values()))
            self.note(self.manager.page_tables(self.running).tolist(), self.manager.stats())

    def note(self, *answers):
        for answer in answers:
            self.digest.update(repr(answer).encode())

    def possible(self):
        room = len(self.running + self.swapped) < MAX_SEQS
        calls = [self.admit, self.admit] if room else []
        calls += [self.extend, self.truncate, self.release, self.release, self.swap_out] if self.running else []
        calls += [self.fork] if room and self.running else []
        return calls + ([self.swap_in] if self.swapped else [])

    def tokens(self, n):
        return [self.rng.randrange(3) for _ in range(n)]

    def admit(self):
        known = self.rng.randrange(LONGEST)  # of the same text, or its namespace's
        prompt = Prompt([1] * known + self.tokens(LONGEST - known), namespace=self.rng.choice("ab"))
        seq = self.manager.admit(prompt)
        self.manager.commit(seq, len(prompt) - self.manager.computed(seq))
        self.running.append(seq)

    def extend(self):
        seqs = [seq for seq in self.running if self.manager.lengths(seq)[0] < LONGEST]
        self.manager.extend(seqs, 1, self.tokens(len(seqs)))
        self.manager.commit(seqs)

    def fork(self):
        self.running += self.manager.fork(self.rng.choice(self.running))

    def truncate(self):
        """Speculation: tokens that are rejected before they are committed."""
        seq = self.rng.choice(self.running)
        (length,) = self.manager.lengths(seq).tolist()
        if length < LONGEST:
            self.manager.extend(seq, LONGEST - length)
            self.manager.truncate(seq, length)

    def release(self):
        seq = self.rng.choice(self.running)
        self.manager.release(seq)
        self.running.remove(seq)

    def swap_out(self):
        seq = self.rng.choice(self.running)
        self.manager.swap_out(seq)
        self.running.remove(seq)
        self.swapped.append(seq)

    def swap_in(self):
        seq = self.rng.choice(self.swapped)
        self.manager.swap_in(seq)
        self.swapped.remove(seq)
        self.running.append(seq)
