import hashlib

import numpy as np
import pytest
from managing import add, computed, ended, new_manager, refused, table, unchanged, write

from paged_cache._src.manager import IndexedPage, LayerGroup, Media, OutOfPages, Prompt
from paged_cache._src.manager.cache_hit import CacheHitSearch
from paged_cache._src.manager.prefix import PrefixIndex

FULL, WINDOW, CHUNKED = LayerGroup.full(), LayerGroup.window(5), LayerGroup.chunked(8)
CAT, DOG = (Media(start=1, stop=6, digest=digest) for digest in (b"cat", b"dog"))


@pytest.fixture
def collisions(monkeypatch):
    """Keys by the tokens of the page alone, so that pages after different ones collide."""

    def hash_page(parent, token_ids, media):
        return hashlib.sha256(token_ids[:4]).digest()

    for module in ("sequences", "prompt", "restore"):
        monkeypatch.setattr(f"paged_cache._src.manager.{module}.hash_page", hash_page)


def needed(group, num_pages, page_size):
    """Pages that a query after `num_pages` pages sees."""
    return range(
        group.first_needed(num_pages * page_size) // page_size if group.is_self_attention else num_pages, num_pages
    )


def page_of(prompt, page, page_size, group, page_id):
    """The index entry of a page that holds a page of the prompt, or part of one."""
    token_ids = prompt.token_ids[page * page_size : (page + 1) * page_size]
    page_hash = prompt.prefix_hash(page + 1, page_size) if len(token_ids) == page_size else b""
    parent_hash = prompt.prefix_hash(page, page_size)
    return IndexedPage(
        page=page_id, group=group, hash=page_hash, parent_hash=parent_hash, token_ids=token_ids.tobytes()
    )


@pytest.mark.parametrize("length", range(1, 13))
def test_one_token_is_always_left_to_compute(length):
    manager = new_manager()
    ended(manager, range(12))
    seq = manager.admit(range(length))
    assert manager.computed(seq) == length - 1 == manager.lengths(seq) - 1


def test_full_pages_are_shared_with_those_who_have_them():
    manager = new_manager()
    first = computed(manager, range(10))
    second = manager.admit([*range(8), 50, 51, 52])
    assert table(manager, second)[:2] == table(manager, first)[:2]
    assert table(manager, second)[2] != table(manager, first)[2]
    assert manager.refcounts(table(manager, second)).tolist() == [2, 2, 1]
    assert manager.computed(second) == 8


def test_pages_are_indexed_as_soon_as_they_are_full():
    manager = new_manager()
    seq = manager.admit(range(4))
    for done in range(4):
        assert manager.cached_tokens(range(9)) == 0
        manager.commit(seq)
        assert manager.computed(seq) == done + 1
    assert manager.cached_tokens(range(9)) == 4


def test_a_page_is_a_hit_only_after_the_same_prefix():
    manager = new_manager(page_size=2)
    ended(manager, [1, 2, 3, 4])
    assert manager.cached_tokens([1, 2, 3, 4, 5]) == 4
    assert manager.cached_tokens([1, 2, 9, 4, 5]) == 2
    assert manager.cached_tokens([3, 4, 5]) == 0
    assert manager.cached_tokens([0, 1, 2, 3, 4]) == 0


def test_pages_are_indexed_if_commit_gets_the_tokens_and_not_if_they_stay_unknown():
    manager = new_manager(page_size=2)
    told, untold = computed(manager, [1]), computed(manager, [5])
    manager.extend([told, untold], 4)
    manager.commit(told, 4, [2, 3, 4, 6])
    manager.commit(untold, 4)
    manager.release([told, untold])
    assert manager.cached_tokens([1, 2, 3, 4, 6, 7]) == 5
    assert manager.cached_tokens([5, 2, 3, 4, 6, 7]) == 0


def test_nothing_after_an_unknown_token_is_indexed_until_it_is_truncated():
    manager = new_manager(page_size=2)
    seq = computed(manager, [1, 2, 3])
    manager.extend(seq)
    manager.commit(seq)
    write(manager, seq, 2, [5, 6])
    assert manager.token_ids(seq).tolist() == [1, 2, 3, -1, 5, 6]
    assert manager.cached_tokens([1, 2, 3, 4, 5, 6, 7]) == 2
    manager.truncate(seq, 3)
    write(manager, seq, 3, [4, 5, 6])
    assert manager.cached_tokens([1, 2, 3, 4, 5, 6, 7]) == 6


def test_finding_takes_nothing():
    manager = new_manager()
    ended(manager, range(12))
    with unchanged(manager):
        assert manager.cached_tokens(range(12)) == 11
        assert manager.pages_to_admit(range(12)) == 3


@pytest.mark.parametrize("other", [{"namespace": "b"}, {"adapter": "a"}, {"namespace": "a", "adapter": "a"}, {}])
def test_a_prefix_is_never_shared_across_namespaces_or_adapters(other):
    manager = new_manager()
    seq = computed(manager, Prompt(range(10), namespace="a"))
    stranger = manager.admit(Prompt(range(10), **other))
    assert not set(table(manager, stranger)) & set(table(manager, seq))
    manager.release([seq, stranger])
    assert manager.cached_tokens(Prompt(range(10), namespace="c")) == 0, "nor by partial pages"
    assert manager.cached_tokens(Prompt(range(10), namespace="a")) == 9


def test_tokens_that_stand_for_other_media_are_other_tokens():
    manager = new_manager()
    ended(manager, Prompt(range(12), media=[CAT]))
    assert manager.cached_tokens(Prompt(range(12), media=[CAT])) == 11
    assert manager.cached_tokens(Prompt(range(12), media=[DOG])) == 0
    assert manager.cached_tokens(range(12)) == 0


def test_pages_after_media_depend_on_them():
    manager = new_manager(page_size=2)
    ended(manager, Prompt(range(12), media=[CAT]))
    found = [manager.cached_tokens(Prompt(range(12), media=media)) for media in ([CAT], [DOG], [CAT, DOG], [])]
    assert found == [11, 0, 0, 0]
    assert manager.cached_tokens(Prompt([*range(8), 70, 71], media=[CAT])) == 8


def test_a_partial_page_with_media_is_no_hit():
    manager = new_manager()
    ended(manager, Prompt(range(6), media=[Media(start=5, stop=6, digest=b"cat")]))
    assert manager.cached_tokens(Prompt(range(9), media=[Media(start=5, stop=6, digest=b"cat")])) == 4
    assert manager.cached_tokens(range(9)) == 4


@pytest.mark.usefixtures("collisions")
def test_a_hit_does_not_rest_on_the_hash_alone():
    manager = new_manager(page_size=2)
    ended(manager, [1, 2, 3, 4])
    assert manager.cached_tokens([1, 2, 3, 4, 5]) == 4
    assert manager.cached_tokens([1, 9, 3, 4, 5]) == 1, (
        "same hash, other tokens: only the first is the same, on a partial hit"
    )
    assert manager.cached_tokens([8, 2, 3, 4, 5]) == 0, "the second page is another's, after another hash"
    assert manager.cached_tokens(Prompt([1, 2, 3, 4, 5], namespace="b")) == 0, (
        "a collision does not open another namespace"
    )
    assert manager.cached_tokens(Prompt([1, 2, 3, 4, 5], media=[Media(start=1, stop=2, digest=b"cat")])) == 0


def test_the_last_page_is_a_partial_hit_and_is_copied():
    manager = new_manager()
    ended(manager, range(7))
    seq = manager.admit([0, 1, 2, 3, 4, 5, 90, 91])
    assert manager.computed(seq) == 6
    (moves,) = manager.take_moves()
    assert moves.copy_from.tolist() == [2], "the page of tokens 4, 5, 6"
    assert moves.copy_to.tolist() == table(manager, seq)[1:]
    assert manager.refcounts(2) == 0, "it can be found by others too"
    assert manager.cached_tokens(range(8)) == 7


def test_a_full_page_can_be_the_last_page_of_another():
    manager = new_manager()
    first = computed(manager, range(8))
    second = manager.admit(range(8))  # all but the last token
    assert manager.computed(second) == 7
    assert table(manager, second)[0] == table(manager, first)[0]
    assert manager.take_moves()[0].copy_from.tolist() == table(manager, first)[1:]


def test_without_a_page_to_copy_the_partial_one_it_is_written_over():
    manager = new_manager(num_pages=3)
    ended(manager, range(6))
    seq = manager.admit([*range(6), 90])
    assert manager.computed(seq) == 4
    assert manager.take_moves() == []
    assert manager.num_free == 0


def test_a_partial_page_is_cached_after_the_last_release():
    manager = new_manager()
    seq = computed(manager, range(6))
    (twin,) = manager.fork(seq)
    manager.release(seq)
    assert manager.cached_tokens(range(9)) == 4
    manager.release(twin)
    assert manager.cached_tokens(range(9)) == 6


def test_a_refused_admission_takes_no_page_of_the_hit():
    manager = new_manager(num_pages=5)
    ended(manager, range(12))
    with refused(manager, OutOfPages, "asked for 3 pages, but 2 are free"):
        manager.admit([*range(8), *range(50, 62)])  # two found pages of four, so two are left for three
    seq = manager.admit([*range(8), *range(50, 58)])
    assert manager.computed(seq) == 8


def test_pages_of_the_hit_are_not_evicted_for_the_new_pages():
    manager = new_manager(num_pages=5)
    ended(manager, range(4))
    ended(manager, range(50, 62))
    seq = manager.admit([0, 1, 2, 3, *range(70, 82)])  # the found page is the least recently used
    assert manager.computed(seq) == 4
    assert sorted(table(manager, seq)) == [1, 2, 3, 4]


def test_a_chain_is_evicted_from_its_end():
    manager = new_manager(num_pages=6)
    ended(manager, range(16))
    seq = manager.admit([90] * 8)  # one page that is empty, and the last of the chain
    assert manager.cached_tokens(range(20)) == 12
    assert manager.num_cached == 3
    manager.release(seq)
    assert manager.cached_tokens(range(20)) == 12


def test_a_chain_is_evicted_from_its_end_in_all_groups_alike():
    manager = new_manager(num_pages=9, groups=(FULL, FULL))
    ended(manager, range(16))
    manager.admit([90] * 8)  # evicts four of eight pages, of either group two
    assert manager.cached_tokens(range(20)) == 8


def test_a_pinned_chain_is_evicted_from_its_end_once_it_is_unpinned():
    manager = new_manager(num_pages=9, groups=(FULL, FULL))
    ended(manager, range(16))
    manager.unpin(manager.pin(range(16)))
    manager.admit([90] * 8)
    assert manager.cached_tokens(range(20)) == 8


def test_what_was_used_last_is_evicted_last():
    manager = new_manager(num_pages=4)
    for start in (0, 100, 200):
        ended(manager, range(start, start + 4))
    ended(manager, [0, 1, 2, 3, 50])  # the oldest is used again, beside a new page: 100 .. 103 is evicted
    assert [manager.cached_tokens(range(start, start + 5)) for start in (0, 100, 200)] == [4, 0, 4]


def test_reuse_can_be_switched_off():
    manager = new_manager(prefix_reuse=False, num_host_pages=4)
    seq = computed(manager, range(10))
    manager.swap_out(seq)
    manager.swap_in(seq)
    manager.release(seq)
    assert manager.cached_tokens(range(10)) == 0
    assert manager.num_cached == 0


def test_a_window_needs_only_its_last_pages_to_go_on():
    manager = new_manager(groups=(WINDOW,))
    ended(manager, range(17))
    seq = manager.admit([*range(16), 90])
    assert manager.computed(seq) == 16
    assert [page > 0 for page in table(manager, seq)] == [False, False, False, True, True]


def test_a_new_chunk_needs_no_page_of_the_one_before():
    manager = new_manager(groups=(CHUNKED,))
    ended(manager, range(9))
    seq = manager.admit([*range(8), 90])
    assert manager.computed(seq) == 8
    assert [page > 0 for page in table(manager, seq)] == [False, False, True]


@pytest.mark.parametrize(
    "groups",
    [(FULL,), (WINDOW,), (CHUNKED,), (FULL, WINDOW), (FULL, LayerGroup.cross(), CHUNKED), (WINDOW, CHUNKED)],
    ids=lambda groups: " and ".join(group.kind for group in groups),
)
def test_the_hit_is_the_longest_that_every_group_can_continue_from(groups):
    draw, prompt = np.random.default_rng(1), Prompt(range(16))
    for _ in range(40):
        there = draw.random((len(groups), 8)) < 0.8
        ids = 1 + np.arange(there.size).reshape(there.shape)
        index = PrefixIndex(len(groups), 1 + there.size)
        for group, page in np.argwhere(there).tolist():
            add(index, page_of(prompt, page, 2, group, page_id=int(ids[group, page])))
        pages = [[ids[at, needed(group, n, 2)] for at, group in enumerate(groups)] for n in range(9)]
        most = max(n for n in range(9) if all(there.ravel()[each - 1].all() for each in pages[n]))
        reuse = CacheHitSearch(index, groups, 2, prompt).longest(limit=16)
        assert reuse.num_pages == most
        assert [found.tolist() for found in reuse.pages] == [each.tolist() for each in pages[most]]


def test_a_partial_page_counts_only_when_every_group_has_one():
    index, prompt = PrefixIndex(2, 9), Prompt(range(7))
    for group in (0, 1):
        add(index, page_of(prompt, 0, 4, group=group, page_id=1 + group))
        reuse = CacheHitSearch(index, (FULL, WINDOW), 4, prompt).longest(limit=7)
        assert (reuse.num_tokens, reuse.tails.tolist()) == (4 * group, [])
    for group, tails in ((0, []), (1, [3, 4])):
        add(index, page_of(prompt, 1, 4, group=group, page_id=3 + group))
        reuse = CacheHitSearch(index, (FULL, WINDOW), 4, prompt).longest(limit=7)
        assert (reuse.num_tokens, reuse.tails.tolist()) == (7 if tails else 4, tails)


def test_a_partial_page_is_copied_in_every_group():
    manager = new_manager(groups=(FULL, WINDOW))
    ended(manager, range(7))
    seq = manager.admit(range(9))
    (moves,) = manager.take_moves()
    assert moves.copy_to.tolist() == [table(manager, seq, group)[1] for group in (0, 1)]


def test_content_in_two_pages_is_a_hit_until_both_are_evicted():
    manager = new_manager(num_pages=9)
    first, second = (manager.admit(range(9)) for _ in range(2))
    manager.commit([first, second], 9)
    assert manager.num_used == 6
    manager.release(first)
    manager.release(manager.admit([50] * 20))  # evicts what the first has left
    assert manager.cached_tokens(range(9)) == 0
    manager.release(second)
    assert manager.cached_tokens(range(10)) == 9


def test_the_same_partial_page_is_indexed_once():
    manager = new_manager()
    for _ in range(3):
        ended(manager, range(6))
    assert manager.num_cached == 2


def test_a_prompt_that_waits_is_hashed_once(monkeypatch):
    manager = new_manager()
    ended(manager, range(12))
    sha256, hashed, prompt = hashlib.sha256, [], Prompt(range(12))
    monkeypatch.setattr(hashlib, "sha256", lambda data: hashed.append(data) or sha256(data))
    for _ in range(3):
        manager.cached_tokens(prompt)
        manager.pages_to_admit(prompt)
    manager.admit(prompt)
    assert len(hashed) == 2
