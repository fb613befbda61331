import pytest
from managing import computed, ended, new_manager, table, write

from paged_cache._src.manager import LayerGroup, OutOfPages, PageEvent, Prompt


def watched(**options):
    """A manager, and the events of its operations so far."""
    manager, seen = new_manager(**options), []
    manager.subscribe(seen.extend)
    return manager, seen


def kinds(events):
    return [(event.kind, event.page) for event in events]


def taken(events):
    """The events so far, and none the next time."""
    got = events.copy()
    events.clear()
    return got


def test_a_page_is_stored_when_it_is_full_or_its_sequence_ends():
    manager, seen = watched()
    prompt = Prompt(range(6))
    seq = computed(manager, prompt)
    assert taken(seen) == [PageEvent("stored", 1, 0, prompt.prefix_hash(1, page_size=4))]
    manager.release(seq)
    assert taken(seen) == [PageEvent("stored", 2, 0, b"")]


def test_a_cached_page_is_evicted_when_it_is_allocated():
    manager, seen = watched(num_pages=4)
    prompt = Prompt(range(9))
    ended(manager, prompt)
    seen.clear()
    manager.admit(range(50, 55))
    assert taken(seen) == [
        PageEvent("evicted", 3, 0, b""),
        PageEvent("evicted", 2, 0, prompt.prefix_hash(2, page_size=4)),
    ]


def test_a_page_is_removed_when_it_is_rewritten_or_the_prefix_cache_is_reset():
    manager, seen = watched()
    seq = computed(manager, range(8))
    manager.truncate(seq, 6)
    assert kinds(taken(seen)) == [("stored", 1), ("stored", 2)]
    manager.extend(seq)
    assert kinds(taken(seen)) == [("removed", 2)]
    manager.reset_prefix_cache()
    assert kinds(taken(seen)) == [("removed", 1)]


def test_pages_are_swapped_out_and_in_group_by_group():
    manager, seen = watched(groups=(LayerGroup.full(), LayerGroup.window(3)), num_host_pages=4, prefix_reuse=False)
    seq = computed(manager, range(6))
    held = [(group, page) for group in (0, 1) for page in table(manager, seq, group) if page]
    manager.swap_out(seq)
    assert taken(seen) == [PageEvent("swapped_out", page, group) for group, page in held]
    manager.swap_in(seq)
    held = [(group, page) for group in (0, 1) for page in table(manager, seq, group) if page]
    assert taken(seen) == [PageEvent("swapped_in", page, group) for group, page in held]


def test_pages_swapped_in_are_stored_again_if_they_were_evicted():
    manager, seen = watched(num_pages=4, num_host_pages=3)
    seq = computed(manager, range(9))
    manager.swap_out(seq)
    manager.release(manager.admit(range(50, 62)))
    seen.clear()
    manager.swap_in(seq)
    pages = table(manager, seq)
    assert kinds(seen) == [("swapped_in", page) for page in pages] + [("stored", page) for page in pages[:2]]


def test_the_page_of_the_same_content_is_stored_once():
    manager, seen = watched(prefix_reuse=True)
    seqs = [manager.admit(range(4)), manager.admit(range(4))]
    manager.commit(seqs, 4)
    assert kinds(seen) == [("stored", 1)]


def test_a_subscriber_is_called_once_for_each_operation_that_has_events():
    manager, calls = new_manager(), []
    manager.subscribe(calls.append)
    seqs = [manager.admit(range(8)), manager.admit(range(20, 28))]
    manager.commit(seqs, 8)
    assert [len(events) for events in calls] == [4]
    write(manager, seqs, 1, [1, 2])
    assert len(calls) == 1
    manager.cached_tokens(range(8))
    manager.release(seqs)
    assert [len(events) for events in calls] == [4, 2]


def test_all_subscribers_are_told_the_same_in_the_order_in_which_they_came():
    manager, calls = new_manager(), []
    for name in ("first", "second"):
        manager.subscribe(lambda events, name=name: calls.append((name, kinds(events))))
    computed(manager, range(4))
    assert calls == [("first", [("stored", 1)]), ("second", [("stored", 1)])]


def test_the_operation_is_complete_when_a_subscriber_is_called():
    manager, seen = new_manager(), []
    manager.subscribe(lambda _: seen.append((manager.num_used, manager.cached_tokens(range(8)))))
    seq = computed(manager, range(4))
    manager.release(seq)
    ended(manager, range(50, 56))
    assert seen == [(1, 4), (2, 4), (0, 4)]


def test_an_error_of_a_subscriber_reaches_the_caller_and_undoes_nothing():
    manager = new_manager()

    def fail(events):
        raise KeyError(events[0].kind)

    manager.subscribe(fail)
    with pytest.raises(KeyError, match="stored"):
        computed(manager, range(4))
    assert manager.cached_tokens(range(8)) == 4


def test_a_refused_call_has_no_events():
    manager, seen = watched(num_pages=3)
    ended(manager, range(8))
    seen.clear()
    with pytest.raises(OutOfPages, match="asked for 3 pages"):
        manager.admit(range(50, 62))
    manager.admit([7])
    assert kinds(seen) == [("evicted", 2)]
