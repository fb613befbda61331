"""Schedulers that admit by the manager's counts of pages finish every request that the pool can hold alone."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from managing import computed, new_manager, refused, table
from small_scheduler import Request, SmallScheduler

from paged_cache._src.manager import LayerGroup, PageManager

FULL, WINDOW, CROSS = LayerGroup.full(), LayerGroup.window(6), LayerGroup.cross()
windows = st.builds(LayerGroup.window, st.integers(1, 12)) | st.builds(LayerGroup.chunked, st.integers(1, 12))
any_groups = st.lists(windows, min_size=1, max_size=2) | st.lists(windows, max_size=2).map(lambda more: [FULL, *more])


def pages_for(groups, page_size, tokens, chunk):
    return sum(group.most_pages(tokens, chunk, page_size) for group in groups)


@st.composite
def requests(draw):
    """Up to eight requests of up to 40 tokens, many of which begin alike."""
    made = []
    for _ in range(draw(st.integers(1, 8))):
        total = draw(st.integers(1, 40))
        shared = draw(st.integers(0, total))
        tokens = [*range(shared), *(draw(st.integers(100, 103)) for _ in range(total - shared))]
        made.append(Request(tokens, prompt=draw(st.integers(1, total))))
    return made


@settings(max_examples=150)
@given(
    groups=any_groups,
    waiting=requests(),
    page_size=st.integers(1, 5),
    chunk=st.integers(1, 12),
    spare=st.integers(0, 4),
    reuse=st.booleans(),
)
def test_no_request_waits_for_ever_in_a_pool_that_holds_the_largest(groups, waiting, page_size, chunk, spare, reuse):
    largest = max(pages_for(groups, page_size, len(request.token_ids), chunk) for request in waiting)
    manager = PageManager(
        1 + largest + spare, page_size, max_seqs=4, max_sequence_length=40, groups=groups, prefix_reuse=reuse
    )
    SmallScheduler(manager, waiting, chunk).run()
    assert all(request.is_done for request in waiting)
    assert manager.num_used == 0


@pytest.mark.parametrize("groups", [(FULL, WINDOW), (WINDOW,)], ids=["full and window", "window"])
def test_requests_share_a_pool_that_holds_little_more_than_one(groups):
    waiting = [Request([first, *range(30)], prompt=20) for first in range(6)]
    pages = pages_for(groups, 4, 31, 8)
    manager = PageManager(pages + 3, 4, max_seqs=4, max_sequence_length=40, groups=groups)
    scheduler = SmallScheduler(manager, waiting, 8)
    assert scheduler.run() < 6 * 16, "fewer steps than one after the other"
    assert all(request.is_done for request in waiting)


def test_a_window_is_charged_what_it_holds_and_not_the_whole_prompt():
    manager = new_manager(num_pages=6, groups=(WINDOW,))
    prompt = range(30)
    assert [manager.pages_to_admit(prompt, chunk=chunk) for chunk in (4, 8, 30)] == [3, 4, 8]
    assert manager.pages_to_admit(prompt) == 8 > manager.num_free
    seq = manager.admit(prompt, chunk=8)
    most = 0
    for start in range(0, 30, 8):
        if start:
            manager.extend(seq, min(8, 30 - start), prompt[start : start + 8])
        most = max(most, manager.num_used)
        manager.commit(seq, min(8, 30 - start))
    assert most <= manager.pages_for(30, chunk=8) == 4


def test_pages_for_counts_all_groups():
    manager = new_manager(groups=(FULL, WINDOW, CROSS))
    assert manager.pages_for(30, chunk=8, cross_tokens=9) == 8 + 4 + 3
    assert new_manager().pages_for(0, chunk=1) == 0


def test_pages_to_extend_counts_what_is_not_held_yet():
    manager = new_manager(groups=(FULL, WINDOW))
    seq, other = computed(manager, range(9)), computed(manager, range(50, 53))
    assert [len(table(manager, seq)), manager.num_used] == [3, 3 + 2 + 1 + 1]
    assert manager.pages_to_extend([seq, other], [9, 3], chunk=4) == 1  # the window may come to lie over a third page
    assert manager.pages_to_extend([seq, other], [17, 3], chunk=4) == 2 + 1
    assert manager.pages_to_extend(other, 30, chunk=4) == 7 + 2
    assert manager.pages_to_extend(seq, 1, chunk=4) == 0
    assert manager.pages_to_extend([], [], chunk=4) == 0


def test_pages_to_admit_counts_indexed_pages_only_if_they_are_free():
    manager = new_manager(groups=(FULL, WINDOW))
    seq = computed(manager, range(17))
    assert manager.pages_to_admit(range(20), chunk=4) == 1 + 2  # the window's page 2 is free: the first one left it
    manager.release(seq)
    assert manager.pages_to_admit(range(20), chunk=4) == 5 + 3


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda m, s: m.pages_for(-1, chunk=1), "num_tokens=-1 must be a whole number of at least 0"),
        (lambda m, s: m.pages_for(1, chunk=0), "chunk=0 must be a whole number of at least 1"),
        (lambda m, s: m.pages_for(1, chunk=1, cross_tokens=3), "cross_tokens=3 must be 0"),
        (lambda m, s: m.pages_to_admit([1], chunk=0), "chunk=0 must be a whole number of at least 1"),
        (lambda m, s: m.pages_to_extend([s], [9, 9], chunk=1), r"lengths=\[9, 9\] must be a whole number, or one for"),
        (lambda m, s: m.pages_to_extend([s], [0], chunk=1), "lengths holds 0; each must lie in 1"),
        (lambda m, s: m.pages_to_extend([s], 4, chunk=True), "chunk=True must be a whole number"),
        (lambda m, s: m.pages_to_extend([s + 1], 4, chunk=1), "does not exist"),
    ],
)
def test_what_cannot_be_asked_is_named(ask, message):
    manager = new_manager()
    seq = computed(manager, [1])
    with refused(manager, ValueError, message):
        ask(manager, seq)
