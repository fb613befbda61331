"""Any order of operations, against a model that knows of no pages and a device that remembers what was written."""

import collections
import itertools
import sys

import pytest
from checked_manager import CheckedManager, Config
from failures import SEAMS, Failure
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from paged_cache._src.manager import LayerGroup, Media

FULL, CROSS = LayerGroup.full(), LayerGroup.cross()
CONFIGS = {
    "full": Config(page_size=2, num_pages=9),
    "one token a page": Config(page_size=1, num_pages=13, num_host_pages=4),
    "large pages": Config(page_size=4, num_pages=6, num_host_pages=2, max_sequence_length=11),
    "few pages": Config(page_size=3, num_pages=4, scrub=True, max_sequence_length=11),
    "host": Config(page_size=3, num_pages=7, num_host_pages=4, scrub=True),
    "window": Config(page_size=2, num_pages=13, groups=(FULL, LayerGroup.window(3)), num_host_pages=4),
    "windows": Config(page_size=1, num_pages=12, groups=(LayerGroup.window(2), LayerGroup.window(5)), scrub=True),
    "chunks": Config(
        page_size=2,
        num_pages=12,
        groups=(LayerGroup.chunked(4), LayerGroup.window(4)),
        num_host_pages=3,
        max_sequence_length=11,
    ),
    "cross": Config(page_size=2, num_pages=12, groups=(FULL, CROSS), num_host_pages=4, scrub=True),
    "all groups": Config(page_size=3, num_pages=13, groups=(FULL, CROSS, LayerGroup.window(4), LayerGroup.chunked(6))),
    "no reuse": Config(page_size=2, num_pages=8, prefix_reuse=False, num_host_pages=4, scrub=True),
    "roomy": Config(page_size=3, num_pages=40, groups=(FULL, LayerGroup.window(4)), max_seqs=8, num_host_pages=12),
}
UNIT_OPERATIONS, SLOW_OPERATIONS = 5_000, 200_000  # over all configurations
STEPS = 50

TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=4)
PLACES = st.integers(0, 7)  # of a sequence, a text or a pin, counted round
NAMESPACES = st.sampled_from(["", "", "", "lora"])
ADAPTERS = st.sampled_from(["", "", "", "lora"])
FAILURES = st.none() | st.none() | st.builds(Failure, seam=st.sampled_from(SEAMS), at=st.integers(0, 60))
PICTURES = [Media(start=start, stop=3, digest=name) for start in (0, 0, 1) for name in (b"cat", b"dog")]
WRONG = [  # some sequences are right, and something is not
    ("does not exist", lambda manager, seqs: manager.release([*seqs, 10**6])),
    ("does not exist", lambda manager, seqs: manager.extend([*seqs, 10**6])),
    ("does not exist", lambda manager, seqs: manager.commit([*seqs, 10**6])),
    ("times; name each once", lambda manager, seqs: manager.release([*seqs, seqs[0]])),
    ("longer than", lambda manager, seqs: manager.extend(seqs, [1] * (len(seqs) - 1) + [99])),
    ("tokens left", lambda manager, seqs: manager.commit(seqs, [1] * (len(seqs) - 1) + [99])),
    ("must hold|longer than", lambda manager, seqs: manager.extend(seqs, 1, [0] * (len(seqs) + 1))),
    ("must lie in 0", lambda manager, seqs: manager.truncate(seqs[0], 99)),
    ("not swapped out", lambda manager, seqs: manager.swap_in(seqs[0])),
]
PROMPTS = {
    "base": PLACES,
    "cut": st.integers(0, 12),
    "tail": TOKENS,
    "chunk": st.none() | st.integers(1, 5),
    "namespace": NAMESPACES,
    "adapter": ADAPTERS,
    "pictures": st.lists(st.sampled_from(PICTURES), max_size=1),
    "cross_tokens": st.integers(1, 5),
}


class ManagerAgainstModel(RuleBasedStateMachine):
    """Sequences come, grow, share, are cut, leave for the host and end; pages are nearly always too few."""

    config: Config
    done: collections.Counter[str]

    def __init__(self):
        super().__init__()
        self.checked = CheckedManager(self.config)
        self.texts = [[0, 1, 0, 0, 1, 1, 0, 1, 1, 1, 0, 0]]

    def teardown(self):
        checked = self.checked
        self.done.update(operations=checked.operations, failed=checked.failed, out_of_pages=checked.out_of_pages)

    def pick(self, places, among):
        """Some of these, each once."""
        return list(dict.fromkeys(among[place % len(among)] for place in places))

    def text(self, base, cut, tail):
        """One that starts like an earlier one."""
        text = self.texts[base % len(self.texts)]
        return [*text[: cut % (len(text) + 1)], *tail][: self.config.max_sequence_length]

    def remember(self, seq):
        self.texts = [*self.texts[-6:], list(self.checked[seq].tokens)]

    @property
    def has_room(self):
        return len(self.checked.plain.sequences) < self.config.max_seqs

    @property
    def running(self):
        return self.checked.running

    @property
    def all_computed(self):
        return [seq for seq in self.running if self.checked[seq].computed == self.checked[seq].length > 0]

    @property
    def growing(self):
        return [seq for seq in self.running if self.checked[seq].length < self.config.max_sequence_length]

    @property
    def uncommitted(self):
        return [seq for seq in self.running if self.checked[seq].computed < self.checked[seq].written]

    @property
    def swapped(self):
        return [seq for seq, sequence in self.checked.plain.sequences.items() if sequence.swapped]

    @rule(failure=FAILURES)
    def fail_next(self, failure):
        """The operations that come next are tried with this failure first."""
        self.checked.failures = [failure] if failure else []

    @initialize(**PROMPTS)
    def start(self, **prompt):
        self.admit_one(**prompt)
        self.checked.step()

    @precondition(lambda self: self.has_room)
    @rule(**PROMPTS)
    def admit(self, **prompt):
        self.admit_one(**prompt)

    def admit_one(self, base, cut, tail, chunk, namespace, adapter, pictures, cross_tokens):
        text = self.text(base, cut, tail)
        cross_tokens *= self.config.has_cross
        depends_on = {"namespace": namespace, "adapter": adapter, "media": pictures}
        self.checked.admit(text, chunk=chunk, cross_tokens=cross_tokens, **depends_on)

    @precondition(lambda self: self.growing)
    @rule(places=st.lists(PLACES, min_size=1, max_size=5), tail=TOKENS, tell=st.sampled_from([True, True, False]))
    def extend(self, places, tail, tell):
        tokens = {}
        for seq in self.pick(places, self.growing):
            sequence = self.checked[seq]
            room = self.config.max_sequence_length - sequence.length
            tokens[seq] = (sequence.rest[: len(tail)] or tail)[:room]
        self.checked.extend(tokens, tell=tell)

    @precondition(lambda self: self.running)
    @rule(places=st.lists(PLACES, min_size=1, max_size=5))
    def run(self, places):
        self.checked.run(self.pick(places, self.running))

    @precondition(lambda self: self.uncommitted)
    @rule(places=st.lists(PLACES, min_size=1, max_size=5), most=st.integers(1, 9), tell=st.booleans())
    def commit(self, places, most, tell):
        written = [(seq, self.checked[seq]) for seq in self.pick(places, self.uncommitted)]
        self.checked.commit({seq: min(most, each.written - each.computed) for seq, each in written}, tell=tell)

    @precondition(lambda self: self.running)
    @rule()
    def step(self):
        self.checked.step()

    @precondition(lambda self: self.has_room and self.all_computed)
    @rule(place=PLACES, n=st.integers(1, 2))
    def fork(self, place, n):
        (seq,) = self.pick([place], self.all_computed)
        if len(self.checked.plain.sequences) + n <= self.config.max_seqs:
            self.checked.fork(seq, n)

    @precondition(lambda self: self.running)
    @rule(place=PLACES, back=st.integers(0, 5))
    def truncate(self, place, back):
        (seq,) = self.pick([place], self.running)
        self.remember(seq)
        self.checked.truncate(seq, max(0, self.checked[seq].length - back))

    @precondition(lambda self: self.checked.plain.sequences)
    @rule(places=st.lists(PLACES, min_size=1, max_size=2))
    def release(self, places):
        seqs = self.pick(places, list(self.checked.plain.sequences))
        for seq in seqs:
            self.remember(seq)
        self.checked.release(*seqs)

    @precondition(lambda self: self.all_computed)
    @rule(place=PLACES)
    def swap_out(self, place):
        self.checked.swap_out(*self.pick([place], self.all_computed))

    @precondition(lambda self: self.swapped)
    @rule(place=PLACES)
    def swap_in(self, place):
        self.checked.swap_in(*self.pick([place], self.swapped))

    @precondition(lambda self: len(self.checked.pins) < 2)
    @rule(base=PLACES, cut=st.integers(0, 12), tail=TOKENS, namespace=NAMESPACES)
    def pin(self, base, cut, tail, namespace):
        self.checked.pin(self.text(base, cut, tail), namespace=namespace)

    @precondition(lambda self: self.checked.pins)
    @rule(place=PLACES)
    def unpin(self, place):
        self.checked.unpin(*self.pick([place], self.checked.pins))

    @rule(base=PLACES, cut=st.integers(0, 12), tail=TOKENS, namespace=NAMESPACES, adapter=ADAPTERS)
    def find(self, base, cut, tail, namespace, adapter):
        self.checked.find(self.text(base, cut, tail), namespace=namespace, adapter=adapter)

    @precondition(lambda self: self.running)
    @rule(places=st.lists(PLACES, min_size=1, max_size=3), wrong=st.sampled_from(WRONG))
    def refuse(self, places, wrong):
        seqs, (message, call) = self.pick(places, self.running), wrong
        self.checked.refuses(message, lambda manager: call(manager, seqs))

    @precondition(lambda self: self.checked.operations % 20 == 19)
    @rule()
    def reset_prefix_cache(self):
        self.checked.reset_prefix_cache()

    @precondition(lambda self: self.checked.operations % 10 == 4)
    @rule()
    def restore(self):
        self.checked.restore()


def run_machine(name, at=None, **options):
    """What was done in random examples with the manager of this configuration; the same ones for the same `at`."""
    fields = {"config": CONFIGS[name], "done": collections.Counter()}
    machine = type("ManagerAgainstModel", (ManagerAgainstModel,), fields)
    if at is not None:
        machine = seed(at)(machine)
    checks = list(HealthCheck)  # steps that find nothing to do are no waste here
    options = {"stateful_step_count": STEPS, "deadline": None, "suppress_health_check": checks, **options}
    run_state_machine_as_test(machine, settings=settings(**options))
    return machine.done


@pytest.mark.once
@pytest.mark.parametrize("name", CONFIGS)
def test_the_manager_agrees_with_the_model(name):
    done, share = collections.Counter(), -(-UNIT_OPERATIONS // len(CONFIGS))
    for at in itertools.count():
        if done["operations"] >= share and done["failed"]:
            break
        done += run_machine(name, at, max_examples=8, database=None)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_the_manager_agrees_with_the_model_for_long(name, capfd):
    done, share = collections.Counter(), -(-SLOW_OPERATIONS // len(CONFIGS))
    while done["operations"] < share:
        done += run_machine(name, max_examples=100)
        with capfd.disabled():
            print(f"{name}: {dict(done)} of {share}", file=sys.stderr, flush=True)
    assert done["failed"] > share // 100
