import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from paged_cache import OutOfPages, PagePool

NUM_PAGES = 7


def test_hands_out_every_page_but_the_null_page_once():
    pages = PagePool(5).allocate(4)
    assert sorted(pages) == [1, 2, 3, 4]


def test_allocate_none_takes_nothing():
    pool = PagePool(3)
    assert pool.allocate(0) == []
    assert pool.num_free == 2


def test_a_released_page_goes_out_again():
    pool = PagePool(3)
    page, _ = pool.allocate(2)
    pool.release([page])
    assert pool.allocate(1) == [page]


def test_fault_16_running_out_of_pages_can_be_waited_out():
    pool = PagePool(4)
    held = pool.allocate(2)
    with pytest.raises(OutOfPages, match=r"asked for 2 pages, but 1 are free; .* wait") as caught:
        pool.allocate(2)
    assert (caught.value.asked, caught.value.free) == (2, 1)
    assert pool.num_free == 1  # nothing was taken
    pool.release(held)
    assert len(pool.allocate(2)) == 2


def test_fault_16_shared_pages_stay_until_their_last_owner_leaves():
    pool = PagePool(4)
    prefix = pool.allocate(2)
    pool.share(prefix)
    pool.release(prefix)
    assert pool.num_free == 1
    assert [pool.ref_count(page) for page in prefix] == [1, 1]
    pool.release(prefix)
    assert pool.num_free == 3


@pytest.mark.parametrize("call", ["share", "release"])
@pytest.mark.parametrize(
    ("page", "message"),
    [(0, r"page 0 must lie in 1\.\.4"), (5, r"page 5 must lie"), (-1, r"page -1 must lie"), (4, "page 4 has 0 owners")],
)
def test_a_page_that_is_not_owned_is_refused_and_nothing_is_half_done(call, page, message):
    pool = PagePool(5)
    held = pool.allocate(2)
    with pytest.raises(ValueError, match=message):
        getattr(pool, call)([held[0], page])
    assert [pool.ref_count(each) for each in held] == [1, 1]
    assert pool.num_free == 2


def test_fault_16_a_free_page_keeps_its_content_until_it_is_handed_out():
    pool = PagePool(4)
    held = pool.allocate(3)
    pool.keep(held[0], b"a")
    pool.release(held)
    assert pool.num_free == 3
    assert pool.find(b"a") == held[0]
    pool.share([held[0]])  # out of the middle of the queue
    assert (pool.num_free, pool.ref_count(held[0])) == (2, 1)
    assert held[0] not in pool.allocate(2)
    pool.release(held[:1])
    assert pool.allocate(1) == held[:1]
    assert pool.find(b"a") is None, "its content is evicted"


def test_fault_16_the_least_recently_used_content_is_evicted_first():
    pool = PagePool(5)
    old, new, empty, used_again = pool.allocate(4)
    for page, key in ((old, b"old"), (new, b"new"), (used_again, b"used again")):
        pool.keep(page, key)
    pool.release([used_again, old, new, empty])
    pool.share([used_again])
    pool.release([used_again])
    assert pool.allocate(4) == [empty, old, new, used_again], "pages without content go out before any other"


def test_the_first_page_with_a_key_stays_the_one_that_is_found():
    pool = PagePool(4)
    first, second = pool.allocate(2)
    pool.keep(first, b"a")
    pool.keep(second, b"a")
    pool.keep(first, b"a")
    assert pool.find(b"a") == first
    pool.release([second])
    with pytest.raises(ValueError, match=f"page {second} has 0 owners and cannot be shared"):
        pool.share([second])


def test_content_is_kept_once_and_by_an_owner():
    pool = PagePool(4)
    (page,) = pool.allocate(1)
    pool.keep(page, b"a")
    with pytest.raises(ValueError, match=f"page {page} is kept under another key; .* must not be written again"):
        pool.keep(page, b"b")
    pool.release([page])
    with pytest.raises(ValueError, match=f"page {page} has 0 owners and cannot be kept"):
        pool.keep(page, b"a")
    with pytest.raises(ValueError, match=r"page 0 must lie in 1\.\.3"):
        pool.keep(0, b"a")


def test_double_release_is_refused():
    pool = PagePool(5)
    held = pool.allocate(2)
    pool.release(held[:1])
    with pytest.raises(ValueError, match=f"page {held[0]} has 0 owners and cannot be released 1 times"):
        pool.release(held)
    assert pool.ref_count(held[1]) == 1


def test_a_page_named_twice_needs_two_owners():
    pool = PagePool(5)
    (page,) = pool.allocate(1)
    with pytest.raises(ValueError, match=f"page {page} has 1 owners and cannot be released 2 times"):
        pool.release([page, page])
    pool.share([page, page])
    assert pool.ref_count(page) == 3
    pool.release([page] * 3)
    assert pool.num_used == 0


def test_negative_and_tiny_numbers_are_refused():
    with pytest.raises(ValueError, match="n=-1 must not be negative"):
        PagePool(3).allocate(-1)
    with pytest.raises(ValueError, match="num_pages=1 must be at least 2"):
        PagePool(1)
    with pytest.raises(ValueError, match="page 3 must lie in"):
        PagePool(3).ref_count(3)


class PoolAgainstModel(RuleBasedStateMachine):
    """Any order of calls agrees with a dictionary from page to owners."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(NUM_PAGES)
        self.owners: dict[int, int] = {}

    @rule(n=st.integers(0, NUM_PAGES))
    def allocate(self, n):
        if n > NUM_PAGES - 1 - len(self.owners):
            with pytest.raises(OutOfPages):
                self.pool.allocate(n)
            return
        pages = self.pool.allocate(n)
        assert len(set(pages)) == n
        assert not set(pages) & self.owners.keys()
        self.owners |= dict.fromkeys(pages, 1)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def share(self, data):
        page = data.draw(st.sampled_from(sorted(self.owners)))
        self.pool.share([page])
        self.owners[page] += 1

    @rule(pages=st.lists(st.integers(-1, NUM_PAGES), max_size=4))
    def release(self, pages):
        left = {page: self.owners.get(page, 0) - pages.count(page) for page in pages}
        if any(count < 0 for count in left.values()):
            with pytest.raises(ValueError, match="page"):
                self.pool.release(pages)
            return
        self.pool.release(pages)
        self.owners = {page: n for page, n in (self.owners | left).items() if n > 0}

    @invariant()
    def agrees(self):
        assert 0 not in self.owners
        assert self.pool.num_used == len(self.owners)
        assert self.pool.num_free + self.pool.num_used == NUM_PAGES - 1
        for page in range(1, NUM_PAGES):
            assert self.pool.ref_count(page) == self.owners.get(page, 0)


PoolAgainstModel.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPoolAgainstModel = PoolAgainstModel.TestCase
