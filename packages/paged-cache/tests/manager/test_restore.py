import numpy as np
import pytest
from managing import computed, ended, new_manager, refused, table

from paged_cache._src.manager import LayerGroup, Media, Prompt

GROUPS = (LayerGroup.full(), LayerGroup.cross(), LayerGroup.window(5))


def cached(*prompts, **options):
    """What a manager keeps of these prompts."""
    manager = new_manager(**options)
    for prompt in prompts:
        ended(manager, prompt)
    return manager.indexed_pages()


def test_restored_pages_are_cache_hits_in_another_manager():
    prompt = Prompt(range(11), namespace="a", media=[Media(start=1, stop=2, digest=b"cat")])
    there = cached(prompt, [7, 8, 9])
    manager = new_manager()
    pages = manager.restore(there)
    assert sorted(pages.tolist()) == [1, 2, 3, 4]
    assert manager.cached_tokens(prompt) == 10
    assert manager.cached_tokens([7, 8, 9, 10]) == 3
    assert (manager.num_used, manager.num_cached) == (0, 4)
    assert [page._replace(page=0) for page in manager.indexed_pages()] == [page._replace(page=0) for page in there]


def test_every_group_gets_its_own():
    groups = (LayerGroup.full(), LayerGroup.window(5))
    manager = new_manager(groups=groups)
    pages = manager.restore(cached(range(11), groups=groups))
    assert len(pages) == 6
    assert manager.cached_tokens(range(11)) == 10


def test_indexed_content_is_not_restored_again():
    there = cached(range(11))
    manager = new_manager()
    seq = computed(manager, range(9))
    pages = manager.restore(there)
    assert pages.tolist() == [0, 0, 4], "two full pages are here, the longer partial one is not"
    assert manager.restore(there).tolist() == [0, 0, 0]
    assert table(manager, seq) == [1, 2, 3]


def test_only_empty_pages_are_taken_and_the_start_first():
    manager = new_manager(num_pages=4)
    ended(manager, range(90, 95))
    assert manager.num_cached == 2
    assert np.count_nonzero(manager.restore(cached(range(11)))) == 1
    assert manager.cached_tokens(range(11)) == 4
    assert manager.cached_tokens(range(90, 96)) == 5
    assert manager.stats().evictions == 0


def test_restored_pages_are_evicted_from_the_end():
    manager = new_manager(num_pages=4)
    manager.restore(cached(range(12)))
    manager.admit([99])
    assert manager.cached_tokens(range(12)) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group": 3}, r"a cached page is of group 3; it must be one of the self-attention groups \[0, 2\]"),
        ({"group": 1}, r"a cached page is of group 1; it must be one of the self-attention groups \[0, 2\]"),
        ({"token_ids": bytes(12)}, "a cached page holds 3 tokens, which does not fit page_size=4"),
        ({"token_ids": bytes(7), "hash": b""}, r"a cached page holds 1\.75 tokens, which does not fit page_size=4"),
        ({"token_ids": bytes(16), "hash": b""}, "a cached page holds 4 tokens, which does not fit page_size=4"),
        ({"token_ids": b"", "hash": b""}, "a cached page holds 0 tokens, which does not fit page_size=4"),
        ({"token_ids": bytes(16)}, "a cached page's hash is not that of its tokens; it is damaged or foreign"),
        ({"parent_hash": bytes(32)}, "a cached page's hash is not that of its tokens"),
        ({"parent_hash": b"other"}, "a cached page's parent_hash has 5 bytes; it must have 32"),
        ({"token_ids": b"\xff" * 8, "hash": b""}, "a cached page's token_ids hold a negative number"),
        ({"token_ids": bytes(8), "hash": b"", "media": b"cat"}, "a cached page that is not full has media"),
        ({"media": b"cat"}, "a cached page's hash is not that of its tokens"),
    ],
)
def test_a_page_that_this_cache_could_not_hold_is_refused_and_none_is_taken(changes, message):
    manager = new_manager(groups=GROUPS)
    good, page = cached(range(9))[:2]
    with refused(manager, ValueError, message):
        manager.restore([good, page._replace(**changes)])
