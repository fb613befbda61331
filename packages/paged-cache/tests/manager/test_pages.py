import numpy as np
import pytest

from paged_cache._src.manager.pages import Pages

OLD = b"old"


def content(page_hash):
    return page_hash, b"", b"1234", b""


def full(scrub):
    """Two pages: 1 is cached, 2 is empty."""
    pages = Pages(3, 1, scrub=scrub)
    both = pages.allocate(2)
    pages.add_to_index(0, both[:1], [content(OLD)])
    pages.release(both)
    pages.take_moves()
    return pages


def zeroed(pages):
    return [page for moves in pages.take_moves() for page in moves.zero.tolist()]


def test_a_manager_of_no_pages_is_refused():
    with pytest.raises(ValueError, match="num_pages=1 must be at least 2: page 0 is the null page, never handed out"):
        Pages(1, 1, scrub=False)


def test_a_cached_page_is_evicted_when_there_are_too_few_empty_pages():
    pages = full(scrub=False)
    assert pages.allocate(1).tolist() == [2]
    assert pages.index.contains(0, content(OLD))
    assert pages.allocate(1).tolist() == [1]
    assert not pages.index.contains(0, content(OLD))
    assert pages.counts.evictions == 1


def test_the_life_of_a_page():
    pages = full(scrub=False)
    pages.share(np.array([1], np.int32), 2)
    assert pages.pool.refcounts([1, 2]).tolist() == [2, 0]
    pages.remove_from_index(np.array([1], np.int32))
    pages.release(np.array([1, 1], np.int32))
    assert (pages.pool.num_empty, pages.pool.num_cached) == (2, 0)


def test_scrub_zeroes_pages_when_their_content_is_dropped_and_not_while_they_are_cached():
    pages = full(scrub=True)
    taken = pages.allocate(1)
    assert zeroed(pages) == [], "page 2 held nothing"
    pages.release(taken)
    assert zeroed(pages) == [2], "released without being kept"
    pages.allocate(2)
    assert zeroed(pages) == [1], "evicted"


def test_clear_index_empties_and_scrubs_cached_pages():
    pages = full(scrub=True)
    owned = pages.allocate(1)
    pages.add_to_index(0, owned, [content(b"new")])
    pages.clear_index()
    assert zeroed(pages) == [1]
    assert (pages.pool.num_empty, pages.pool.num_used) == (1, 1)
    assert not pages.index.is_indexed.any()
    pages.release(owned)
    assert zeroed(pages) == [2]


def test_without_scrub_nothing_is_zeroed():
    pages = full(scrub=False)
    pages.release(pages.allocate(2))
    pages.clear_index()
    assert zeroed(pages) == []
