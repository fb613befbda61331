"""Hostile inputs: small mutators, cases that are drawn by a seed, and bounds that each case must keep.

Each case is a test of its own. Its name has the seed and the mutator, so that one case can be run alone:

    pytest "packages/paged-attn-layer/tests/test_fuzz.py::test_gguf_bytes[17-flip_bits]"
"""

import contextlib
import copy
import dataclasses
import json
import random
import re
import resource
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from resigned import at, changed, paths, without

SECONDS = 20
"""The longest that a case may take, on a busy machine too."""
MEBIBYTES = 256
"""The most memory that a case may take beyond what the process had."""
REFUSED = object()
"""What `attempt` returns for an input that was refused."""
_SAYS_WHAT_TO_DO = re.compile(r"must|download|give|use|add|save|load|supported|write|export|import|leave")
_HUGE = (2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)


@dataclasses.dataclass(frozen=True)
class Case:
    """A mutator and the seed of its choices: a function from a right input to a hostile one."""

    mutator: Callable[[random.Random, Any], Any]
    seed: int

    def __call__(self, thing: Any) -> Any:
        return self.mutator(random.Random(f"{self.mutator.__name__} {self.seed}"), thing)


def fuzzed(mutators: Sequence[Callable], *, quick: int, most: int) -> pytest.MarkDecorator:
    """Runs a test with `most` cases, the mutators in turn. The first `quick` run always, the others with `-m fuzz`."""
    cases = [Case(mutators[seed % len(mutators)], seed) for seed in range(most)]
    params = [
        pytest.param(case, id=f"{case.seed}-{case.mutator.__name__}", marks=[pytest.mark.fuzz] * (case.seed >= quick))
        for case in cases
    ]
    return pytest.mark.parametrize("case", params)


def attempt(call: Callable[[], Any], *names: object) -> Any:
    """Returns what the call returns, or `REFUSED` after an error of ours with one of `names` and advice."""
    with bounded():
        try:
            return call()
        except (ValueError, NotImplementedError) as refusal:
            error = refusal
    assert type(error) in (ValueError, NotImplementedError) or type(error).__module__.startswith("paged_"), repr(error)
    assert not names or any(str(name) in str(error) for name in names), repr(error)
    assert _SAYS_WHAT_TO_DO.search(str(error)), repr(error)
    return REFUSED


class TooSlow(BaseException):
    """No `except Exception` swallows it."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Fails if the `with` takes more than `SECONDS` or `MEBIBYTES`."""
    before = _peak_mebibytes()
    handler = signal.signal(signal.SIGALRM, _give_up)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert _peak_mebibytes() - before < MEBIBYTES


def _give_up(*_: object) -> None:
    raise TooSlow(f"a case took {SECONDS} seconds")


def _peak_mebibytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts KiB


def run_of(rng: random.Random, data: bytes, most: int = 16) -> slice:
    """A few bytes that follow each other."""
    start = rng.randrange(len(data) + 1)
    return slice(start, start + rng.randint(1, most))


def replaced(data: bytes, where: slice, by: bytes) -> bytes:
    """The bytes with others in the place of some."""
    return data[: where.start] + by + data[where.stop :]


def cut(rng: random.Random, data: bytes) -> bytes:
    """Ends somewhere."""
    return data[: rng.randrange(len(data))]


def flip_bits(rng: random.Random, data: bytes) -> bytes:
    """Up to four bits are others."""
    mutated = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        mutated[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(mutated)


def overwrite(rng: random.Random, data: bytes) -> bytes:
    """Some bytes are random."""
    where = run_of(rng, data)
    return replaced(data, where, rng.randbytes(where.stop - where.start))[: len(data)]


def drop(rng: random.Random, data: bytes) -> bytes:
    """Some bytes are missing."""
    return replaced(data, run_of(rng, data), b"")


def insert(rng: random.Random, data: bytes) -> bytes:
    """There are more bytes."""
    start = rng.randrange(len(data))
    return replaced(data, slice(start, start), rng.randbytes(rng.randint(1, 16)))


def repeat(rng: random.Random, data: bytes) -> bytes:
    """Some bytes are there twice."""
    where = run_of(rng, data, 64)
    return replaced(data, where, data[where] * 2)


def splice(rng: random.Random, data: bytes) -> bytes:
    """Some bytes are those of another place."""
    return replaced(data, run_of(rng, data, 64), data[run_of(rng, data, 64)])


def zero(rng: random.Random, data: bytes) -> bytes:
    """Some bytes are 0."""
    where = run_of(rng, data, 64)
    return replaced(data, where, bytes(where.stop - where.start))[: len(data)]


def huge_number(rng: random.Random, data: bytes) -> bytes:
    """Eight bytes are a number that no count is."""
    start = rng.randrange(len(data))
    return replaced(data, slice(start, start + 8), rng.choice(_HUGE).to_bytes(8, "little"))[: len(data)]


BYTES = (cut, flip_bits, overwrite, drop, insert, repeat, splice, zero, huge_number)
"""Mutators of bytes."""

_KINDS = (None, True, False, 0, 1, 1.5, "", "x", [], {}, [None], [[]], {"a": 1}, [1, "x"])
_PLACEHOLDER = "@place@"


def path_of(rng: random.Random, thing: Any) -> tuple:
    """The path of one of the values."""
    return rng.choice(list(paths(thing)))


def key_of(rng: random.Random, thing: Any) -> tuple:
    """The path of one of the values that have a key."""
    return rng.choice([path for path in paths(thing) if isinstance(path[-1], str)])


def dumped(thing: Any, placeholder_is: str = "") -> bytes:
    """JSON, with a text in the place of the placeholder that JSON could not be made of."""
    return json.dumps(thing).replace(f'"{_PLACEHOLDER}"', placeholder_is).encode()


def other_type(rng: random.Random, thing: Any) -> bytes:
    """A value of another type, or an empty one."""
    return dumped(changed(thing, path_of(rng, thing), rng.choice(_KINDS)))


def huge_value(rng: random.Random, thing: Any) -> bytes:
    """A number that no size is, or that Python cannot read."""
    number = rng.choice([*map(str, _HUGE), "1" + "0" * 400, "9" * 5000, "1e308", "1e400", "1e38", "1e39"])
    return dumped(changed(thing, path_of(rng, thing), _PLACEHOLDER), number)


def negative(rng: random.Random, thing: Any) -> bytes:
    """A number below 0, or 0."""
    return dumped(changed(thing, path_of(rng, thing), rng.choice([0, -1, -(2**63), -0.5, -0.0, -1e-300])))


def not_finite(rng: random.Random, thing: Any) -> bytes:
    """What Python reads as a number and JSON does not know."""
    return dumped(changed(thing, path_of(rng, thing), rng.choice([float("nan"), float("inf"), -float("inf")])))


def number_as_text(rng: random.Random, thing: Any) -> bytes:
    """A value in quotes."""
    path = path_of(rng, thing)
    return dumped(changed(thing, path, str(at(thing, path))))


def lone_surrogate(rng: random.Random, thing: Any) -> bytes:
    """Half of a surrogate pair, as a value or as a key."""
    path = key_of(rng, thing)
    other = rng.choice(["\ud800", "\udfff", "x\ud800y", "\x00"])
    if rng.random() < 0.5:
        return dumped(changed(thing, path, other))
    return dumped(changed(without(thing, path), (*path[:-1], other), at(thing, path)))


def left_out(rng: random.Random, thing: Any) -> bytes:
    """A value is missing."""
    return dumped(without(thing, path_of(rng, thing)))


def renamed(rng: random.Random, thing: Any) -> bytes:
    """A value has another key."""
    path = key_of(rng, thing)
    other = rng.choice([path[-1].upper(), path[-1] + "_", path[-1][:-1], "", "../" + path[-1]])
    return dumped(changed(without(thing, path), (*path[:-1], other), at(thing, path)))


def twice(rng: random.Random, thing: Any) -> bytes:
    """A key is there twice, with two values; Python takes the last."""
    path = key_of(rng, thing)
    text = dumped(changed(thing, path, _PLACEHOLDER), '1, "@again@": 2').decode()
    return text.replace("@again@", path[-1]).encode()


def swapped(rng: random.Random, thing: Any) -> bytes:
    """Two values have changed places."""
    one, other = path_of(rng, thing), path_of(rng, thing)
    if one[: len(other)] == other or other[: len(one)] == one:  # one is in the other
        return dumped(changed(thing, one, copy.deepcopy(thing)))
    return dumped(changed(changed(thing, one, at(thing, other)), other, at(thing, one)))


def nested_deeply(rng: random.Random, thing: Any) -> bytes:
    """A value within many lists or objects."""
    depth = rng.choice([100, 2_000, 100_000])
    start, end = rng.choice([("[", "]"), ('{"a":', "}")])
    return dumped(changed(thing, path_of(rng, thing), _PLACEHOLDER), start * depth + "1" + end * depth)


def other_text(rng: random.Random, thing: Any) -> bytes:
    """The JSON text with other bytes."""
    return rng.choice(BYTES)(rng, dumped(thing))


def foreign_text(rng: random.Random, thing: Any) -> bytes:
    """Another JSON value, another encoding, or no JSON at all."""
    text = dumped(thing)
    return rng.choice([b"", b"null", b"[]", b"3", b"\xff", b"\xef\xbb\xbf" + text, text.decode().encode("utf-16")])


JSON = (
    *(other_type, huge_value, negative, not_finite, number_as_text, lone_surrogate, left_out, renamed, twice, swapped),
    *(nested_deeply, other_text, foreign_text),
)
"""Mutators that make a JSON text of an object."""
