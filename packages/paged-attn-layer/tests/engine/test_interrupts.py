"""Ctrl-C and exceptions at every line of the engine: nothing is lost, nothing is left, the next answers are right."""

import contextlib
import signal
import sys
import threading

import pytest
from tiny_models import EveryKind, dense_answer

import paged_attn_layer
import paged_cache
from paged_attn_layer import Engine, EngineConfig
from paged_attn_layer._src.engine.interrupts import hold_interrupts

NEW_TOKENS = 3
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 6, 7], [3] * 14, [5]]
OURS = tuple(module.__file__.removesuffix("__init__.py") for module in (paged_attn_layer, paged_cache))


class Letters:
    eos_token_id = None
    chat_template = None

    def encode(self, text):
        return [ord(letter) - ord("A") for letter in text]

    def decode(self, token_ids, *, skip_special_tokens):
        return "".join(chr(ord("A") + i) for i in token_ids)


def new_engine():
    config = EngineConfig(max_seqs=2, max_sequence_length=20, page_size=4, prefill_chunk=8, num_pages=1 + 24)
    return Engine(EveryKind(), tokenizer=Letters(), config=config)


@pytest.fixture(scope="module")
def engine():
    engine = new_engine()
    engine.warm_up()
    return engine


@pytest.fixture(scope="module")
def expected():
    model = EveryKind()
    return [dense_answer(model, prompt, NEW_TOKENS) for prompt in PROMPTS]


def at_line(n, action):
    """A trace function that calls `action` at the n-th line of our packages that runs."""
    seen = 0

    def trace(frame, event, arg):
        nonlocal seen
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        seen += event == "line"
        if seen == n and event == "line":
            sys.settrace(None)
            action()
        return trace

    return trace


def lines_of(call):
    """The places (file, line) that a call runs, in order."""
    places = []

    def trace(frame, event, arg):
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        if event == "line":
            places.append((frame.f_code.co_filename, frame.f_lineno))
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
    return places


def worth_trying(places):
    """Numbers of lines, from 1: the first time that each line of the engine runs, and some of all others."""
    first = {}
    for n, place in enumerate(places, 1):
        if "/engine/" in place[0]:
            first.setdefault(place, n)
    return sorted({*first.values(), *range(1, len(places), 1 + len(places) // 50)})


def traced(trace, call):
    sys.settrace(trace)
    try:
        return call()
    finally:
        sys.settrace(None)


def assert_idle(engine):
    assert not engine.has_work
    assert engine.pages_used == 0
    assert engine._checkpoint is None


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


def raise_at_once():
    raise KeyboardInterrupt


def test_ctrl_c_at_every_line_of_generate(engine, expected):
    def generate():
        return engine.generate(PROMPTS, max_new_tokens=NEW_TOKENS, arrivals=[0, 0, 1, 2])

    generate()
    places = lines_of(generate)
    chosen, interrupted = worth_trying(places), 0
    for n in chosen:
        try:
            traced(at_line(n, ctrl_c), generate)
        except KeyboardInterrupt:
            interrupted += 1
        assert_idle(engine)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "it was not put back"
        if n % 5 == 0:
            assert [answer.token_ids for answer in generate()] == expected, f"line {n}: {places[n - 1]}"
    assert interrupted > 0.98 * len(chosen) > 200, "Ctrl-C must not be swallowed"
    assert [answer.token_ids for answer in generate()] == expected


def queued(engine):
    requests = [engine.request(prompt, max_new_tokens=NEW_TOKENS) for prompt in PROMPTS]
    for request in requests:
        engine.add_request(request)
    return requests


def state_of(requests):
    return [(request.output_ids, request.finish_reason) for request in requests]


@pytest.mark.parametrize(("part", "step"), [(0, 0), (1, 1), (2, 3), (0, 5)])
def test_an_exception_at_every_line_of_a_step_undoes_the_step(engine, expected, part, step):
    """Here nothing waits: it is raised where it hurts. All requests are served to their end all the same."""
    requests = queued(engine)
    for _ in range(step):
        engine.step()
    places = lines_of(engine.step)
    for request in requests:
        engine.abort(request)
    undone, chosen = 0, worth_trying(places)[part % 3 :: 3]
    for n in chosen:
        requests = queued(engine)
        for _ in range(step):
            engine.step()
        before = state_of(requests)
        with contextlib.suppress(KeyboardInterrupt):
            traced(at_line(n, raise_at_once), engine.step)
        undone += state_of(requests) == before
        for _ in range(50):  # more than it takes; an idle step does nothing
            engine.step()
        assert [request.output_ids for request in requests] == expected, f"line {n}: {places[n - 1]}"
        assert [request.answer for request in requests] == ["".join(chr(65 + i) for i in ids) for ids in expected]
        assert_idle(engine)
    assert undone > 0.8 * len(chosen)


def interrupt_call(n, run, after):
    """`run`, which raises in its n-th call, before or after it did its work."""
    calls = 0

    def interrupted(*args):
        nonlocal calls
        calls += 1
        result = run(*args) if calls != n or after else None
        if calls == n:
            raise KeyboardInterrupt
        return result

    return interrupted


@pytest.mark.parametrize("after", [False, True])
def test_ctrl_c_around_the_compiled_step(engine, expected, after, monkeypatch):
    """The cache is donated: once the compiled step was called, the old one is gone, and the new one not yet stored."""
    steps = len(engine.stats.steps)
    engine.generate(PROMPTS, max_new_tokens=NEW_TOKENS)
    steps = len(engine.stats.steps) - steps
    for n in range(1, steps + 1):
        monkeypatch.setattr(engine._compute, "_run", interrupt_call(n, engine._compute._run, after))
        with pytest.raises(KeyboardInterrupt):
            engine.generate(PROMPTS, max_new_tokens=NEW_TOKENS)
        monkeypatch.undo()
        assert_idle(engine)
        compiled = engine.stats.compilations
        answers = engine.generate(PROMPTS, max_new_tokens=NEW_TOKENS)
        assert [answer.token_ids for answer in answers] == expected
        assert engine.stats.compilations == compiled, "the new cache is as the old one was"


def test_ctrl_c_in_the_warm_up(expected):
    engine = new_engine()
    warm_up, calls = engine._compute.warm_up, []

    def interrupted(shape):
        warm_up(shape)
        calls.append(shape)
        if len(calls) == 2:
            ctrl_c()

    engine._compute.warm_up = interrupted
    with pytest.raises(KeyboardInterrupt):
        engine.warm_up()
    assert len(calls) == 2
    assert [answer.token_ids for answer in engine.generate(PROMPTS, max_new_tokens=NEW_TOKENS)] == expected


def test_ctrl_c_waits_for_the_end_of_the_step_and_keeps_what_is_finished(engine, expected):
    requests = [engine.request(prompt, max_new_tokens=NEW_TOKENS) for prompt in PROMPTS]
    seen = []

    def look(step, finished):
        seen.extend(finished)
        if finished:
            ctrl_c()
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler

    with pytest.raises(KeyboardInterrupt):
        engine.serve(requests, on_step=look)
    assert seen
    assert {request.finish_reason for request in requests} == {"length", "aborted"}
    assert all(r.output_ids == ids for r, ids in zip(requests, expected, strict=True) if r.finish_reason == "length")
    assert_idle(engine)


def held(*actions):
    with hold_interrupts():
        for action in actions:
            action()


def test_a_second_ctrl_c_does_not_wait():
    reached = []
    with pytest.raises(KeyboardInterrupt):
        held(ctrl_c, lambda: reached.append(1), ctrl_c, lambda: reached.append(2))
    assert reached == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_blocks_may_be_nested_and_an_exception_does_not_swallow_ctrl_c():
    reached = []
    with pytest.raises(KeyboardInterrupt) as raised:
        held(lambda: held(ctrl_c), lambda: reached.append(1), lambda: {}["wrong"])
    assert reached
    assert isinstance(raised.value.__context__, KeyError)


def test_sigterm_waits_too_if_it_has_a_handler():
    def end(number, frame):
        raise SystemExit(number)

    reached = []
    before = signal.signal(signal.SIGTERM, end)
    try:
        with pytest.raises(SystemExit):
            held(lambda: signal.raise_signal(signal.SIGTERM), lambda: reached.append(1))
        assert reached
        assert signal.getsignal(signal.SIGTERM) is end
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_engine_works_in_another_thread(engine, expected):
    answers = []
    thread = threading.Thread(target=lambda: answers.extend(engine.generate(PROMPTS, max_new_tokens=NEW_TOKENS)))
    thread.start()
    thread.join()
    assert [answer.token_ids for answer in answers] == expected
