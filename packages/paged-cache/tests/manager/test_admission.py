import pytest
from managing import computed, ended, new_manager, refused, table

from paged_cache._src.manager import LayerGroup, OutOfPages, Prompt

BOTH = (LayerGroup.full(), LayerGroup.window(5))
ALL = (*BOTH, LayerGroup.cross())


def test_a_prompt_gets_slots_for_all_its_tokens():
    manager = new_manager()
    seq = manager.admit(range(9))
    assert (manager.lengths(seq), manager.computed(seq)) == (9, 0)
    assert table(manager, seq) == [1, 2, 3]
    assert manager.token_ids(seq).tolist() == list(range(9))


def test_a_chunked_prompt_gets_slots_for_the_chunk_after_the_cache_hit():
    manager = new_manager()
    seq = manager.admit(range(20), chunk=6)
    assert (manager.lengths(seq), len(table(manager, seq))) == (6, 2)
    manager.commit(seq, 6)
    other = manager.admit([*range(4), *range(50, 60)], chunk=6)
    assert (manager.computed(other), manager.lengths(other)) == (4, 10)
    last = manager.admit([*range(4), 70], chunk=6)
    assert manager.lengths(last) == 5


def test_the_rest_of_a_chunked_prompt_comes_by_extend():
    manager = new_manager()
    seq = manager.admit(range(11), chunk=4)
    for start in (4, 8):
        manager.commit(seq, 4)
        manager.extend(seq, min(4, 11 - start), range(start, min(start + 4, 11)))
    manager.commit(seq, 3)
    assert manager.token_ids(seq).tolist() == list(range(11))
    assert manager.cached_tokens(range(20)) == 8


def test_a_chunk_below_one_is_refused():
    manager = new_manager()
    with refused(manager, ValueError, "chunk=0 must be a whole number of at least 1"):
        manager.admit([1, 2], chunk=0)


def test_no_prompt_is_refused():
    manager = new_manager()
    with refused(manager, ValueError, r"token_ids has shape \(0,\); it must be a list of at least one token id"):
        manager.admit([])


@pytest.mark.parametrize(("groups", "asked"), [(BOTH[:1], 3), (BOTH, 6), (ALL, 8)])
def test_pages_are_needed_for_every_group(groups, asked):
    options = {"cross_tokens": 5} if len(groups) == 3 else {}
    manager = new_manager(num_pages=asked, groups=groups)
    assert manager.pages_to_admit(range(9), **options) == asked
    with refused(manager, OutOfPages, f"asked for {asked} pages, but {asked - 1} are free") as caught:
        manager.admit(range(9), **options)
    assert (caught.value.asked, caught.value.free) == (asked, asked - 1)
    manager = new_manager(num_pages=asked + 1, groups=groups)
    manager.admit(range(9), **options)
    assert manager.num_free == 0


def test_pages_to_admit_counts_pages_of_the_hit_only_if_they_are_free():
    manager = new_manager()
    prompt = Prompt(range(10))
    seq = computed(manager, prompt)
    assert manager.pages_to_admit(prompt) == 1
    manager.release(seq)
    assert manager.pages_to_admit(prompt) == 3
    before = manager.num_free
    manager.admit(prompt)
    assert before - manager.num_free == 3


def test_an_admission_may_take_all_free_pages_besides_its_cache_hit():
    manager = new_manager(num_pages=6)
    ended(manager, range(8))
    seq = manager.admit([*range(8), *range(60, 72)])  # two found, three new
    assert (manager.num_free, len(table(manager, seq)), manager.computed(seq)) == (0, 5, 8)
    assert manager.stats().evictions == 0


def arriving():
    """A manager, and a sequence of 20 tokens that come from elsewhere: of the window it has the last page alone."""
    manager = new_manager(groups=BOTH)
    seq = manager.admit(range(20), imported=True)
    assert [len(table(manager, seq, 0)), [page > 0 for page in table(manager, seq, 1)]] == [5, [False] * 4 + [True]]
    return manager, seq


def test_an_imported_prompt_can_be_committed_in_parts():
    manager, seq = arriving()
    held = manager.page_tables(seq)
    for count in (3, 8, 9):
        manager.commit(seq, count)
    assert (manager.page_tables(seq) == held).all()
    assert manager.cached_tokens(range(21)) == 20


def test_an_imported_prompt_cannot_be_truncated_to_where_a_window_has_no_pages():
    manager, seq = arriving()
    with refused(
        manager, ValueError, "num_tokens=8 is too far back: window layers have released all pages before token 16"
    ):
        manager.truncate(seq, 8)
    manager.release(seq)
    assert manager.num_used == 0


def test_of_an_imported_chunk_the_window_keeps_what_later_queries_see():
    manager = new_manager(groups=BOTH)
    seq = manager.admit(range(20), chunk=8, imported=True)
    assert table(manager, seq, 1) == [0, manager.page_tables(seq)[1, 0, 1]]
