"""Scenarios: sequences of operations that interact. `CheckedManager` checks each step.

Each takes `start(**config)`, which gives a checked manager.
"""

import contextlib
import hashlib
from unittest import mock

from paged_cache._src.manager import LayerGroup, Media, prompt, sequences

FULL, CROSS, WINDOW = LayerGroup.full(), LayerGroup.cross(), LayerGroup.window(3)
TEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]


def forks_write_their_last_page(start):
    """First all in one call, where the last one keeps the page; then one by one."""
    checked = start(num_pages=20, groups=(FULL, LayerGroup.window(4)))
    first = checked.admit(TEXT[:5])
    checked.step()
    second, third = checked.fork(first, 2)
    checked.extend({first: [1], second: [2, 2], third: [3, 3, 3]})
    checked.step()
    fourth = checked.fork(second)[0]
    checked.step()
    checked.extend({fourth: [4]})
    checked.extend({second: [5]})
    checked.step()
    checked.release(first, third)
    checked.step()


def forks_fill_pages_of_their_own(start):
    """One after another, with different tokens. Later prompts hit the pages of each."""
    checked = start(num_pages=20)
    first = checked.admit(TEXT[:2])
    checked.step()
    second = checked.fork(first)[0]
    for seq, token in ((first, 7), (second, 8)):
        checked.extend({seq: [token] * 3})
        checked.step()
    checked.release(first, second)
    for token in (7, 8):
        seq = checked.admit([*TEXT[:2], token, token, token, 9])
        assert checked[seq].computed == 5
        checked.step()


def a_prefix_is_reused(start):
    """Full pages are shared. A partial page is copied, also while its sequence still writes it."""
    checked = start(num_pages=20)
    first = checked.admit(TEXT[:5])
    checked.step()
    second = checked.admit(TEXT[:8])  # shares two pages
    assert checked[second].computed == 4
    checked.step()
    checked.release(first)  # leaves a partial page
    third = checked.admit([*TEXT[:5], 7, 7])
    assert checked[third].computed == 5
    checked.step()
    checked.extend({second: [1], third: [2]})
    checked.step()
    fourth = checked.admit([*TEXT[:7], 8, 8])
    assert checked[fourth].computed == 7
    checked.step()
    fifth = checked.admit(TEXT[:4])  # one token is left to compute
    assert checked[fifth].computed == 3
    checked.step()


def pages_are_evicted(start):
    """In LRU order. Shared and pinned pages are not evicted. Evicted pages are no hits."""
    checked = start(num_pages=8, max_seqs=6)
    checked.release(*[checked.admit([n] * 4) for n in range(3) if not checked.step()])
    for n in range(3):
        seq = checked.admit([n] * 4)
        checked.step()
        checked.release(seq)
    pin = checked.pin([2] * 4)
    assert pin.num_tokens == 4
    shared = checked.admit([1] * 5)
    other = checked.admit([8] * 4)
    checked.step()
    assert checked.admit([9] * 6) is None
    assert checked.find([0] * 5) == 0
    assert checked.find([2] * 5) == 4
    checked.unpin(pin)
    checked.release(shared)
    last = checked.admit([9] * 6)
    checked.step()
    checked.release(other, last)


def tenants_are_apart(start):
    """The same tokens with other namespaces, adapters and pictures are no hits."""
    checked = start(num_pages=30, scrub=True, max_seqs=8)
    cat, dog = (Media(start=0, stop=3, digest=name) for name in (b"cat", b"dog"))
    for depends_on in ({}, {"namespace": "tenant"}, {"adapter": "lora"}, {"media": [cat]}, {"media": [dog]}):
        assert checked.find(TEXT[:6], **depends_on) == 0
        checked.admit(TEXT[:6], **depends_on)
        checked.step()
    assert checked.find(TEXT[:6], media=[dog]) == 5
    assert checked.find(TEXT[:6], namespace="tenant") == 5
    assert checked.find(TEXT[:6], namespace="lora") == 0


def hashes_collide(start):
    """Equal hashes are not enough: tokens are compared."""
    checked = start(num_pages=20)
    with contextlib.ExitStack() as stack:
        for module in (prompt, sequences):
            stack.enter_context(mock.patch.object(module, "hash_page", one_hash_for_all))
        first, second = checked.admit(TEXT[:4]), checked.admit(TEXT[5:9])
        checked.step()
        assert checked.find(TEXT) == 4
        assert checked.find(TEXT[5:]) == 0
        checked.release(first, second)


def one_hash_for_all(parent, token_ids, media):
    """A hash that tells no tokens apart."""
    return hashlib.sha256(parent).digest()


def windows_move_on(start):
    """Windows release pages. A prompt hits the rest only if the whole window is in pages."""
    checked = start(num_pages=40, groups=(WINDOW, LayerGroup.chunked(4), FULL), max_seqs=8)
    first = checked.admit(TEXT[:3])
    for token in TEXT[3:9]:
        checked.step()
        checked.extend({first: [token]})
    checked.step()
    second = checked.admit([*TEXT[:8], 7, 7])
    assert checked[second].computed == 8
    checked.step()
    assert not checked.truncate(second, 4)
    checked.truncate(second, 9)
    third = checked.admit([*TEXT[:4], 7])  # what windows have returned is kept
    assert checked[third].computed == 4
    checked.step(third)
    checked.release(first, second, third)
    fourth = checked.admit(TEXT)
    checked.step()
    assert checked[fourth].computed == 10


def a_window_has_lost_its_first_pages(start):
    """A longer prefix is a hit although a shorter one is not."""
    checked = start(num_pages=10, groups=(WINDOW, FULL))
    first = checked.admit(TEXT[:1])
    for token in TEXT[1:9]:
        checked.step()
        checked.extend({first: [token]})
    checked.step()
    other = checked.admit([8, 8])  # takes the place of pages that the window has returned
    checked.step()
    checked.release(other)
    assert checked.find([*TEXT[:4], 7]) == 0
    assert checked.find(TEXT) == 8
    checked.release(first)
    checked.admit(TEXT)
    checked.step()


def windows_alone(start):
    """No full group, and windows smaller than a page."""
    checked = start(page_size=3, num_pages=20, groups=(LayerGroup.window(2), LayerGroup.window(1)))
    first = checked.admit(TEXT[:7], chunk=2)
    while checked[first].rest:
        checked.step()
        checked.extend({first: checked[first].rest[:2]})
    checked.step()
    second = checked.admit(TEXT)
    assert checked[second].computed == 6
    checked.step()
    checked.fork(second)
    checked.step()


def a_sequence_goes_back(start):
    """Rejected tokens are rewritten, in pages that are indexed, shared or pinned."""
    checked = start(num_pages=20)
    first = checked.admit(TEXT[:6])
    checked.step()
    checked.truncate(first, 5)
    checked.extend({first: [7]})
    checked.step()
    assert checked.find([*TEXT[:6], 8]) == 5
    checked.extend({first: [7, 7, 7]})
    checked.run([first])
    checked.truncate(first, 7)
    checked.commit({first: 1})
    checked.extend({first: [8]})
    checked.step()
    second = checked.fork(first)[0]
    checked.truncate(second, 7)
    checked.extend({second: [1]})
    pin = checked.pin(checked[first].tokens)
    checked.truncate(first, 5)
    checked.step()
    checked.extend({first: [2]})
    checked.step()
    checked.unpin(pin)
    checked.truncate(first, 0)
    checked.extend({first: TEXT[:3]})
    checked.step()


def all_is_swapped(start):
    """Swap out and in before the device makes any move; host pages are reused."""
    checked = start(num_pages=9, num_host_pages=7, scrub=True, groups=(FULL, WINDOW, CROSS), max_sequence_length=6)
    first = checked.admit(TEXT[:5], cross_tokens=3)
    checked.step()
    assert checked.swap_out(first)
    assert checked.swap_in(first)
    checked.step()
    checked.swap_out(first)
    second = checked.admit(TEXT[1:5], namespace="tenant", cross_tokens=2)
    checked.step()
    assert not checked.swap_out(second)
    assert not checked.swap_in(first)
    checked.release(second)
    checked.swap_in(first)
    checked.swap_out(first)
    checked.release(first)
    third = checked.admit(TEXT[:3], cross_tokens=1)
    checked.step()
    checked.swap_out(third)
    checked.swap_in(third)
    checked.extend({third: [5]})
    checked.step()


def pages_change_hands_unseen(start):
    """Pages are released, scrubbed, evicted and copied to several times before the device does any of it."""
    checked = start(num_pages=7, scrub=True, max_seqs=3)
    first = checked.admit(TEXT[:3])
    checked.step()
    for token in range(3):
        second = checked.fork(first)[0]
        checked.extend({second: [token]})
        checked.release(second)
    checked.extend({checked.fork(first)[0]: [9]})
    checked.step()
    checked.release(*checked.running)
    for namespace in ("a", "b", "c"):
        checked.release(checked.admit(TEXT[:9], namespace=namespace))
    checked.admit(TEXT[:9], namespace="d")
    checked.step()


def tokens_are_not_known_yet(start):
    """A page is indexed once all of its tokens are known."""
    checked = start(num_pages=20)
    first = checked.admit(TEXT[:3])
    checked.step()
    checked.extend({first: TEXT[3:6]}, tell=False)
    checked.run([first])
    checked.commit({first: 1}, tell=True)
    assert checked.find(TEXT) == 4
    checked.commit({first: 2}, tell=False)
    checked.extend({first: TEXT[6:8]})
    checked.step()
    assert checked.find(TEXT) == 4
    checked.release(first)
    assert checked.find(TEXT) == 4


def pages_run_out(start):
    """Pages run out at admission, at a copy on write and at a new page. Then a tail is not copied."""
    checked = start(num_pages=6, groups=(FULL, LayerGroup.window(4)), max_seqs=4)
    first = checked.admit(TEXT[:4])
    checked.step()
    assert checked.admit(TEXT[1:4]) is None
    second = checked.fork(first)[0]
    assert not checked.extend({first: [1], second: [2]})
    checked.truncate(second, 3)
    assert not checked.extend({second: [3]})
    checked.release(first)
    assert checked.extend({second: [3]})
    checked.step()


def what_is_wrong_is_refused(start):
    """Wrong arguments next to right ones: the call must change nothing."""
    checked = start(num_pages=20, num_host_pages=9, max_seqs=4)
    first, second = checked.admit(TEXT[:5]), checked.admit(TEXT[1:4])
    checked.step()
    third = checked.admit(TEXT[:7])
    for message, call in (
        ("does not exist", lambda manager: manager.release([first, 99])),
        ("named 2 times", lambda manager: manager.release([first, second, first])),
        ("does not exist", lambda manager: manager.extend([first, 99], 1, [1, 2])),
        ("longer than", lambda manager: manager.extend([first, second], [1, 10])),
        ("counts holds 0", lambda manager: manager.extend([first, second], [1, 0])),
        ("must hold 2 ids", lambda manager: manager.extend([first, second], 1, [1])),
        ("tokens left", lambda manager: manager.commit([third, first], 1)),
        ("was told", lambda manager: manager.commit([third], [2], [TEXT[5], 0])),
        ("not computed", lambda manager: manager.fork(third)),
        ("too many", lambda manager: manager.fork(first, 2)),
        ("must lie in", lambda manager: manager.truncate(first, 6)),
        ("not computed", lambda manager: manager.swap_out(third)),
        ("not swapped out", lambda manager: manager.swap_in(first)),
        ("cross_tokens", lambda manager: manager.admit(TEXT, cross_tokens=1)),
        ("chunk", lambda manager: manager.admit(TEXT, chunk=0)),
        ("longer than", lambda manager: manager.admit([0] * 13)),
    ):
        checked.refuses(message, call)
    checked.swap_out(second)
    checked.refuses("swapped out", lambda manager: manager.extend([first, second]))
    checked.refuses("swapped out", lambda manager: manager.swap_out(second))
    pin = checked.pin(TEXT)
    checked.unpin(pin)
    checked.refuses("unpinned before", lambda manager: manager.unpin(pin))


def the_prefix_cache_is_reset(start):
    """Nothing that was computed before the reset is a hit again."""
    checked = start(num_pages=20, num_host_pages=4, scrub=True)
    first, second = checked.admit(TEXT[:5]), checked.admit(TEXT[1:4])
    checked.step()
    checked.swap_out(second)
    checked.reset_prefix_cache()
    checked.swap_in(second)
    checked.extend({first: [9]})
    checked.step()
    checked.release(first, second)
    assert checked.find(TEXT) == checked.find(TEXT[1:]) == 0
    checked.admit(TEXT[:5])
    checked.step()
    assert checked.find(TEXT) == 4


def slots_are_counted(start):
    """A shared page that one sequence truncates is still full for the other."""
    checked = start(num_pages=20, page_size=4)
    first = checked.admit(TEXT[:8])
    checked.step()
    second = checked.fork(first)[0]
    checked.truncate(second, 6)
    checked.truncate(first, 7)
    checked.release(first)


SCENARIOS = {
    each.__name__: each
    for each in (
        forks_write_their_last_page,
        forks_fill_pages_of_their_own,
        a_prefix_is_reused,
        pages_are_evicted,
        tenants_are_apart,
        hashes_collide,
        windows_move_on,
        a_window_has_lost_its_first_pages,
        windows_alone,
        a_sequence_goes_back,
        all_is_swapped,
        pages_change_hands_unseen,
        tokens_are_not_known_yet,
        pages_run_out,
        what_is_wrong_is_refused,
        the_prefix_cache_is_reset,
        slots_are_counted,
    )
}
