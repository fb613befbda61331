import itertools
import re

import pytest
from fake_model import FakeModel, answer, drain
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_attn_layer._src.engine.request import Request, RequestState
from paged_attn_layer._src.engine.scheduler import Scheduler
from paged_attn_layer._src.engine.text import OutputText
from paged_cache import PageManager


def make(*, num_pages=40, page_size=4, max_seqs=3, max_sequence_length=64, token_budget=16, prefix_reuse=True):
    manager = PageManager(
        num_pages,
        page_size,
        max_seqs=max_seqs,
        max_sequence_length=max_sequence_length,
        prefix_reuse=prefix_reuse,
    )
    return Scheduler(manager, token_budget=token_budget)


def pages_of(scheduler, request):
    """The pages that a request has, in order."""
    if request.seq is None:
        return []
    table = scheduler.manager.page_tables(request.seq)[0, 0]
    return table[table > 0].tolist()


def ask(length, max_new_tokens=4, *, first=1, stop_token_ids=(), text=None, namespace=""):
    prompt = [(first + i) % 50 for i in range(length)]
    return Request(
        prompt_ids=prompt, max_new_tokens=max_new_tokens, stop_token_ids=stop_token_ids, text=text, namespace=namespace
    )


def letters(ids):
    return "".join(chr(ord("A") + i) for i in ids)


def check_invariants(scheduler, step):
    manager = scheduler.manager
    owned = [page for request in scheduler.running for page in pages_of(scheduler, request)]
    assert len(set(owned)) == manager.num_used, "pages leaked"
    for page in owned:
        assert owned.count(page) == manager.refcounts(page), "owners were counted wrong"
        assert manager.prefix_reuse or owned.count(page) == 1
    assert all(request.seq is None for request in scheduler.waiting)
    assert len(scheduler.running) <= manager.max_seqs
    assert 1 <= step.num_tokens <= scheduler.token_budget
    assert step.decode_tokens + step.prefill_tokens == step.num_tokens
    for part in step.work:
        pages = pages_of(scheduler, part.request)
        written = pages[part.start // manager.page_size :]
        assert manager.refcounts(written).tolist() == [1] * len(written), "a shared page is written"
        assert part.start + part.q_len <= len(pages) * manager.page_size
        assert part.samples == (part.start + part.q_len == part.request.num_tokens)


# --- whatever comes, in whatever order, into however small a pool ---

REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 30),  # prompt tokens
        st.integers(1, 12),  # new tokens
        st.integers(0, 25),  # step of arrival
        st.sets(st.integers(0, 49), max_size=4),  # stop tokens
        st.integers(1, 2),  # first token: requests with the same one share a prefix
        st.sampled_from(["", "tenant"]),
    ),
    min_size=1,
    max_size=8,
)


@pytest.mark.parametrize("prefix_reuse", [True, False])
@settings(max_examples=200, deadline=None)
@given(
    asked=REQUESTS,
    page_size=st.integers(1, 8),
    spare_pages=st.integers(0, 12),
    max_seqs=st.integers(1, 5),
    spare_rows=st.integers(1, 20),
)
def test_every_request_gets_its_text_whatever_the_batching(
    prefix_reuse, asked, page_size, spare_pages, max_seqs, spare_rows
):
    longest = max(prompt + new for prompt, new, *_ in asked)
    scheduler = make(
        num_pages=1 + -(-longest // page_size) + spare_pages,  # just enough for the longest, or a little more
        page_size=page_size,
        max_seqs=max_seqs,
        max_sequence_length=longest,
        token_budget=max_seqs + spare_rows,
        prefix_reuse=prefix_reuse,
    )
    requests = [
        ask(p, n, first=first, stop_token_ids=stop, namespace=namespace) for p, n, _, stop, first, namespace in asked
    ]
    coming = sorted(zip([arrival for _, _, arrival, *_ in asked], requests, strict=True), key=lambda pair: pair[0])
    arrived = [request for _, request in coming]
    model = FakeModel(scheduler.manager)
    for now in itertools.count():
        while coming and coming[0][0] <= now:
            scheduler.add(coming.pop(0)[1])
        if not scheduler.has_work:
            if not coming:
                break
            continue
        decoding = {request for request in scheduler.running if request.is_decoding}
        step = scheduler.schedule()
        check_invariants(scheduler, step)
        queue = [*scheduler.running, *scheduler.waiting]
        assert queue == [request for request in arrived if request in queue], "not in order of arrival"
        assert prefix_reuse or not step.cached_tokens
        served = {part.request for part in step.work}
        left_out = [request for request in scheduler.running if request in decoding and request not in served]
        out_of_pages = scheduler.manager.num_free == 0 and left_out == scheduler.running[-1:]
        assert not left_out or out_of_pages, "a decode was starved"
        assert step.work[0].request is queue[0], "the oldest request got nothing"
        scheduler.advance(step, model(step))
        assert now < 5000
    assert scheduler.manager.num_used == 0
    for request in requests:
        assert request.output_ids == answer(request.prompt_ids, request.max_new_tokens, request.stop_token_ids)
        assert request.state is RequestState.FINISHED


# --- the faults of the original scheduler ---


def test_only_the_last_chunk_of_a_prompt_samples():
    scheduler = make(max_seqs=1, token_budget=5)
    request = ask(13, 2)
    scheduler.add(request)
    model, samples = FakeModel(scheduler.manager), []
    drain(scheduler, model, look=lambda step: samples.extend((p.q_len, p.samples) for p in step.work))
    assert samples == [(5, False), (5, False), (3, True), (1, True)]
    assert request.output_ids == answer(request.prompt_ids, 2)


def test_a_stop_string_frees_slot_and_pages_at_once():
    whole = letters(answer(ask(9).prompt_ids, 12))
    request = ask(9, 12, text=OutputText(letters, stop=[whole[3:6]]))
    scheduler = make(max_seqs=1)
    scheduler.add(request)
    scheduler.add(ask(5, 3))
    model = FakeModel(scheduler.manager)
    while request.state is not RequestState.FINISHED:
        step = scheduler.schedule()
        scheduler.advance(step, model(step))
    assert scheduler.manager.num_used == 0, "its pages must be free before the next step"
    assert scheduler.running == []
    assert (request.finish_reason, request.text.value) == ("stop", whole[:3])
    assert len(request.output_ids) == 6
    assert scheduler.schedule().work[0].request.num_tokens == 5, "its slot must be free for the next request"


@pytest.mark.parametrize(
    ("length", "new", "says"),
    [
        (61, 4, "prompt of 61 tokens + max_new_tokens=4 = 65 must be at most max_sequence_length=64"),
        (40, 10, "prompt of 40 tokens + max_new_tokens=10 need 13 pages of 4 tokens, more than the cache's 9"),
    ],
)
def test_a_prompt_that_is_too_long_is_refused_and_not_cut(length, new, says):
    scheduler = make(num_pages=10)
    request = ask(length, new)
    with pytest.raises(ValueError, match=re.escape(says)):
        scheduler.add(request)
    assert not scheduler.has_work
    assert scheduler.manager.num_used == 0
    assert request.num_tokens == length


def test_several_prompts_share_a_step_and_decodes_go_on_beside_them():
    scheduler = make(max_seqs=4, token_budget=20)
    model = FakeModel(scheduler.manager)
    scheduler.add(ask(3, 30))
    step = scheduler.schedule()
    scheduler.advance(step, model(step))
    scheduler.add(ask(10, 2))
    scheduler.add(ask(30, 2))
    step = scheduler.schedule()
    assert [(p.q_len, p.is_decode) for p in step.work] == [(1, True), (10, False), (9, False)]
    assert step.mode == "mixed"
    assert (step.decode_tokens, step.prefill_tokens, step.new_tokens) == (1, 19, 2)


def test_a_short_prompt_takes_a_short_step():
    scheduler = make(max_seqs=4, token_budget=20)
    scheduler.add(ask(3))
    assert scheduler.schedule().num_tokens == 3


def test_decodes_in_every_slot_leave_rows_for_a_prompt():
    scheduler = make(max_seqs=3, token_budget=4)
    model = FakeModel(scheduler.manager)
    scheduler.add(ask(1, 30))
    scheduler.add(ask(1, 30))
    step = scheduler.schedule()
    scheduler.advance(step, model(step))
    scheduler.add(ask(6, 1))
    for _ in range(3):
        step = scheduler.schedule()
        assert [(p.q_len, p.is_decode) for p in step.work] == [(1, True), (1, True), (2, False)]
        scheduler.advance(step, model(step))


def test_the_youngest_is_preempted_and_says_the_same_later():
    scheduler = make(num_pages=1 + 6, max_seqs=2)
    old, young = ask(8, 12), ask(8, 12, first=9)
    scheduler.add(old)
    scheduler.add(young)
    order = drain(scheduler, FakeModel(scheduler.manager), look=lambda step: check_invariants(scheduler, step))
    assert (old.num_preemptions, young.num_preemptions) == (0, 1)
    assert order == [old, young]
    for request in order:
        assert request.output_ids == answer(request.prompt_ids, 12)


def test_requests_wait_for_pages_instead_of_failing():
    scheduler = make(num_pages=1 + 4, max_seqs=3)
    first, second = ask(14, 1), ask(14, 1)
    scheduler.add(first)
    scheduler.add(second)
    step = scheduler.schedule()
    assert [part.request for part in step.work] == [first]
    assert list(scheduler.waiting) == [second]
    scheduler.advance(step, FakeModel(scheduler.manager)(step))
    assert [part.request for part in scheduler.schedule().work] == [second]


def test_an_idle_scheduler_has_no_work_and_takes_nothing():
    scheduler = make()
    assert not scheduler.has_work
    assert scheduler.schedule().work == ()
    assert scheduler.manager.num_used == 0


def test_owners_are_counted_prefixes_reused_pages_evicted_and_waited_for():
    scheduler = make(num_pages=1 + 7, max_seqs=2)
    model = FakeModel(scheduler.manager)
    first, same, other = ask(18, 5), ask(18, 5), ask(14, 2, first=9)
    scheduler.add(first)
    for _ in range(2):
        run_step(scheduler, model)
    scheduler.add(same)
    scheduler.add(other)
    step = run_step(scheduler, model)
    assert step.cached_tokens == 16
    pages = pages_of(scheduler, same)
    assert pages[:4] == pages_of(scheduler, first)[:4]
    assert scheduler.manager.refcounts(pages).tolist() == [2, 2, 2, 2, 1], "owners are counted"
    assert list(scheduler.waiting) == [other], "it waits for pages"
    finished = drain(scheduler, model, look=lambda step: check_invariants(scheduler, step))
    assert finished == [first, same, other]
    assert [request.num_preemptions for request in finished] == [0, 0, 0]
    for request in finished:
        assert request.output_ids == answer(request.prompt_ids, request.max_new_tokens)
    again = ask(18, 1)
    assert scheduler.manager.cached_tokens(again.prompt_ids) == 12, "the end of the prefix was evicted"


# --- requests that start alike ---


def run_step(scheduler, model):
    step = scheduler.schedule()
    check_invariants(scheduler, step)
    scheduler.advance(step, model(step))
    return step


def served(scheduler, model, request):
    """Serve one request alone; the rows that its prompt took, and the tokens that it found."""
    steps = []
    scheduler.add(request)
    drain(scheduler, model, look=steps.append)
    assert request.output_ids == answer(request.prompt_ids, request.max_new_tokens)
    return sum(step.prefill_tokens for step in steps), sum(step.cached_tokens for step in steps)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 7, 8, 9, 20, 40])
def test_the_same_prompt_again_computes_only_its_last_token(length):
    scheduler = make()
    model = FakeModel(scheduler.manager)
    assert served(scheduler, model, ask(length)) == (length, 0)
    assert served(scheduler, model, ask(length)) == (1, length - 1)


def test_without_prefix_reuse_everything_is_computed():
    scheduler = make(prefix_reuse=False)
    model = FakeModel(scheduler.manager)
    for _ in range(2):
        assert served(scheduler, model, ask(20)) == (20, 0)


def test_only_requests_of_the_same_namespace_share_pages():
    scheduler = make()
    model = FakeModel(scheduler.manager)
    for namespace in ("", "a", "b"):
        assert served(scheduler, model, ask(9, namespace=namespace)) == (9, 0)
    for namespace in ("", "a", "b"):
        assert served(scheduler, model, ask(9, namespace=namespace)) == (1, 8)


def test_the_next_turn_of_a_talk_finds_the_answer_too():
    scheduler = make()
    model = FakeModel(scheduler.manager)
    turn = ask(6, 7)
    served(scheduler, model, turn)
    prompt = [*turn.token_ids, 3, 3, 3]  # 13 tokens, of which the last was never computed, and 3 more
    assert served(scheduler, model, Request(prompt_ids=prompt, max_new_tokens=2)) == (4, 12)


def test_pages_are_found_only_after_the_step_that_computed_them():
    scheduler = make(token_budget=9)
    model = FakeModel(scheduler.manager)
    request = ask(20)
    scheduler.add(request)
    found = []
    for _ in range(3):
        step = scheduler.schedule()  # 9 rows, 9 rows, 2 rows
        found.append(scheduler.manager.cached_tokens([*request.token_ids, 1]))
        scheduler.advance(step, model(step))
    assert found == [0, 8, 16]
    assert scheduler.manager.cached_tokens([*request.prompt_ids, 1]) == 20


def test_requests_that_come_together_compute_the_same_pages_each():
    scheduler = make(token_budget=20)
    model = FakeModel(scheduler.manager)
    scheduler.add(ask(9, 2))
    scheduler.add(ask(9, 2))
    assert (run_step(scheduler, model).num_tokens, scheduler.manager.num_used) == (18, 6)
    assert len(drain(scheduler, model)) == 2


def test_a_preempted_request_computes_again_only_what_was_evicted():
    scheduler = make(num_pages=1 + 6, max_seqs=2)
    old, young = ask(8, 12), ask(8, 12, first=9)
    scheduler.add(old)
    scheduler.add(young)
    found = []
    drain(scheduler, FakeModel(scheduler.manager), look=lambda step: found.append(step.cached_tokens))
    assert young.num_preemptions == 1
    assert sum(found) == 4, "one of its pages had not been needed"
    assert young.output_ids == answer(young.prompt_ids, 12)


def test_a_request_admitted_with_one_token_left_takes_a_row_of_the_budget():
    scheduler = make(max_seqs=2, token_budget=3)
    model = FakeModel(scheduler.manager)
    request = ask(8, 4)
    scheduler.add(request)
    while request.num_tokens < 9:
        run_step(scheduler, model)
    scheduler._preempt(request)  # as for an older one, with both pages still to be found
    scheduler.add(ask(6, 1, first=30))
    step = run_step(scheduler, model)  # checks the budget
    assert [(part.q_len, part.is_decode) for part in step.work] == [(1, True), (2, False)]
    drain(scheduler, model)
    assert request.output_ids == answer(request.prompt_ids, 4)


def test_pages_that_only_a_match_holds_are_not_counted_free_twice():
    scheduler = make(num_pages=1 + 5, max_seqs=2)
    model = FakeModel(scheduler.manager)
    served(scheduler, model, ask(16, 1))  # leaves four pages that can be found
    scheduler.add(ask(17, 2))  # finds four, needs one more
    scheduler.add(ask(3, 1, first=30))
    step = run_step(scheduler, model)
    assert [part.q_len for part in step.work] == [1]
    assert (scheduler.manager.num_free, len(scheduler.waiting)) == (0, 1)


# --- the rest ---


def test_pages_are_taken_as_tokens_need_them():
    scheduler = make(max_seqs=1, token_budget=6, page_size=4)
    request = ask(13, 5)
    scheduler.add(request)
    held = []
    drain(scheduler, FakeModel(scheduler.manager), look=lambda step: held.append(len(pages_of(scheduler, request))))
    assert held == [2, 3, 4, 4, 4, 4, 5]


def test_a_prompt_is_admitted_only_when_pages_for_all_of_it_are_unclaimed():
    scheduler = make(num_pages=1 + 10, max_seqs=3, token_budget=8)
    scheduler.add(ask(30, 2))  # claims 8 of the 10 pages, though its first step takes 2
    scheduler.add(ask(12, 2))
    scheduler.schedule()
    assert len(scheduler.running) == 1
    assert scheduler.manager.num_used == 2


def test_pages_that_a_running_prompt_waits_for_are_not_given_to_the_next_request():
    scheduler = make(num_pages=1 + 5, token_budget=9)
    first, second, third = ask(4, 12), ask(16, 2, first=20), ask(2, 1, first=40)
    scheduler.add(first)
    scheduler.add(second)
    step = scheduler.schedule()
    assert step.q_lens.tolist() == [4, 5]  # 3 of the 5 pages
    scheduler.advance(step, FakeModel(scheduler.manager)(step))
    scheduler.add(third)
    step = scheduler.schedule()  # the first takes a fourth page; the second needs two, and the third would need one
    assert [part.request for part in step.work] == [first]
    assert (scheduler.running, list(scheduler.waiting)) == ([first, second], [third])
    assert scheduler.manager.num_free == 1


@pytest.mark.parametrize("running", [True, False])
def test_finish_from_outside_frees_everything(running):
    scheduler = make()
    request = ask(9)
    scheduler.add(request)
    if running:
        scheduler.schedule()
    scheduler.finish(request, "aborted")
    scheduler.finish(request, "stop")
    assert request.finish_reason == "aborted"
    assert not scheduler.has_work
    assert scheduler.manager.num_used == 0


def test_a_budget_without_a_row_for_prompts_is_refused():
    with pytest.raises(ValueError, match="token_budget=3 must exceed max_seqs=3"):
        make(max_seqs=3, token_budget=3)


def test_a_request_is_added_once():
    scheduler = make()
    request = ask(3)
    scheduler.add(request)
    with pytest.raises(ValueError, match=r"was added before \(it is WAITING\); make a new one"):
        scheduler.add(request)
    scheduler.finish(request, "aborted")
    with pytest.raises(ValueError, match=r"was added before \(it is FINISHED\)"):
        scheduler.add(request)
