import numpy as np
import pytest
from managing import computed, ended, new_manager, refused, table

from paged_cache._src.manager import LayerGroup, Media, Prompt

GROUPS = (LayerGroup.full(), LayerGroup.cross(), LayerGroup.window(5))


def kept(*prompts, **options):
    """What a manager keeps of these prompts."""
    manager = new_manager(**options)
    for prompt in prompts:
        ended(manager, prompt)
    return manager.kept_pages()


def test_what_one_manager_keeps_another_finds():
    prompt = Prompt(range(11), namespace="a", media=[Media(start=1, stop=2, digest=b"cat")])
    there = kept(prompt, [7, 8, 9])
    manager = new_manager()
    pages = manager.restore(there)
    assert sorted(pages.tolist()) == [1, 2, 3, 4]
    assert manager.find(prompt) == 10
    assert manager.find([7, 8, 9, 10]) == 3
    assert (manager.num_used, manager.num_kept) == (0, 4)
    assert [page._replace(page=0) for page in manager.kept_pages()] == [page._replace(page=0) for page in there]


def test_every_group_gets_its_own():
    groups = (LayerGroup.full(), LayerGroup.window(5))
    manager = new_manager(groups=groups)
    pages = manager.restore(kept(range(11), groups=groups))
    assert len(pages) == 6
    assert manager.find(range(11)) == 10


def test_what_is_here_is_not_taken_again():
    there = kept(range(11))
    manager = new_manager()
    seq = computed(manager, range(9))
    pages = manager.restore(there)
    assert pages.tolist() == [0, 0, 4], "two full pages are here, the longer partial one is not"
    assert manager.restore(there).tolist() == [0, 0, 0]
    assert table(manager, seq) == [1, 2, 3]


def test_only_empty_pages_are_taken_and_the_start_first():
    manager = new_manager(num_pages=4)
    ended(manager, range(90, 95))
    assert manager.num_kept == 2
    assert np.count_nonzero(manager.restore(kept(range(11)))) == 1
    assert manager.find(range(11)) == 4
    assert manager.find(range(90, 96)) == 5
    assert manager.stats().evictions == 0


def test_what_was_restored_is_evicted_from_its_end():
    manager = new_manager(num_pages=4)
    manager.restore(kept(range(12)))
    manager.admit([99])
    assert manager.find(range(12)) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group": 3}, r"a kept page is of group 3; it must be one of \[0, 2\], which grow"),
        ({"group": 1}, r"a kept page is of group 1; it must be one of \[0, 2\], which grow"),
        ({"token_ids": bytes(12)}, "a kept page holds 3 tokens, which does not fit page_size=4"),
        ({"token_ids": bytes(7), "key": b""}, r"a kept page holds 1\.75 tokens, which does not fit page_size=4"),
        ({"token_ids": bytes(16), "key": b""}, "a kept page holds 4 tokens, which does not fit page_size=4"),
        ({"token_ids": b"", "key": b""}, "a kept page holds 0 tokens, which does not fit page_size=4"),
        ({"token_ids": bytes(16)}, "a kept page's key is not that of its tokens; it is corrupt or was made by"),
        ({"parent": b"other"}, "a kept page's key is not that of its tokens"),
        ({"media": b"cat"}, "a kept page's key is not that of its tokens"),
    ],
)
def test_a_page_that_this_cache_could_not_hold_is_refused_and_none_is_taken(changes, message):
    manager = new_manager(groups=GROUPS)
    good, page = kept(range(9))[:2]
    with refused(manager, ValueError, message):
        manager.restore([good, page._replace(**changes)])
