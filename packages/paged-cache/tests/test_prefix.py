import hashlib

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from paged_cache import OutOfPages, PagePool, Prefix

NUM_PAGES = 9
SALTS = [None, "", "tenant"]


def computed(pool, tokens, page_size=2, salt=None):
    """The pages of a sequence that was computed in one step, and has ended."""
    pages = pool.allocate(-(-len(tokens) // page_size))
    Prefix(pool, page_size, salt).keep(pages, tokens, start=0, end=len(tokens))
    pool.release(reversed(pages))
    return pages


def find(pool, tokens, page_size=2, salt=None):
    return Prefix(pool, page_size, salt).find(tokens)


@pytest.mark.parametrize(("length", "found"), [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (6, 2), (7, 3), (8, 3), (9, 3)])
def test_one_token_is_always_left_to_compute(length, found):
    pool, tokens = PagePool(9), list(range(9))
    pages = computed(pool, tokens[:7])  # three full pages, and one token in the fourth
    assert find(pool, tokens[:length]) == pages[:found]


def test_a_page_is_found_only_after_the_same_start():
    pool = PagePool(9)
    pages = computed(pool, [1, 2, 3, 4])
    assert find(pool, [1, 2, 3, 4, 5]) == pages
    assert find(pool, [1, 2, 9, 4, 5]) == pages[:1]
    assert find(pool, [3, 4, 5]) == []
    assert find(pool, [0, 1, 2, 3, 4]) == []


def test_finding_takes_nothing():
    pool = PagePool(9)
    computed(pool, [1, 2, 3, 4])
    pages = find(pool, [1, 2, 3, 4, 5])
    assert (pool.num_used, pool.ref_count(pages[0])) == (0, 0)


def test_other_salts_never_share_pages():
    pool = PagePool(9)
    pages = {salt: computed(pool, [1, 2, 3], salt=salt) for salt in SALTS}
    for salt in SALTS:
        assert find(pool, [1, 2, 3], salt=salt) == pages[salt][:1]
    assert find(pool, [1, 2, 3], salt="other") == []
    assert len({tuple(each[:1]) for each in pages.values()}) == 3


def test_a_chain_is_evicted_from_its_end():
    pool = PagePool(5)
    pages = computed(pool, [1, 2, 3, 4, 5, 6])
    pool.allocate(2)  # the page that was never used, and the last of the chain
    assert find(pool, [1, 2, 3, 4, 5, 6, 7]) == pages[:2]


def test_pages_are_kept_as_they_fill():
    pool = PagePool(9)
    tokens, pages = [1, 2, 3, 4, 5], pool.allocate(3)
    prefix = Prefix(pool, 2)
    for end, found in [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2)]:
        prefix.keep(pages, tokens[:end], start=end - 1, end=end)
        assert find(pool, [*tokens, 6]) == pages[:found]


def test_a_sequence_is_hashed_once(monkeypatch):
    pool, tokens, hashed = PagePool(9), list(range(8)), []
    sha256 = hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", lambda data: hashed.append(data) or sha256(data))
    prefix, pages = Prefix(pool, 2), pool.allocate(4)
    for end in range(1, 9):
        prefix.find(tokens)
        prefix.keep(pages, tokens, start=end - 1, end=end)
    assert len(hashed) == 4


@pytest.mark.parametrize(
    ("num_pages", "num_tokens", "start", "end"), [(1, 4, 0, 4), (2, 3, 0, 4), (2, 4, -1, 4), (2, 4, 3, 2)]
)
def test_pages_that_are_not_full_are_refused(num_pages, num_tokens, start, end):
    pool = PagePool(9)
    pages = pool.allocate(num_pages)
    with pytest.raises(ValueError, match=rf"start={start}, end={end} must be .* {num_tokens} tokens and {num_pages} p"):
        Prefix(pool, 2).keep(pages, [1] * num_tokens, start=start, end=end)
    assert find(pool, [1] * 9) == []


def test_a_page_size_below_one_is_refused():
    with pytest.raises(ValueError, match="page_size=0 must be at least 1"):
        Prefix(PagePool(2), 0)


class Sequence:
    """What a scheduler knows of a sequence."""

    def __init__(self, prefix, salt, tokens):
        self.prefix = prefix
        self.salt = salt
        self.tokens = tokens
        self.pages = []
        self.computed = 0


class PrefixAgainstModel(RuleBasedStateMachine):
    """Sequences come, grow, share and end in any order; a page that is found holds the tokens that it was found for.

    The model keeps what each page holds (all tokens up to the newest written into it, with the salt), the owners, and
    the free queue as a list.
    """

    @initialize(page_size=st.integers(1, 3))
    def start(self, page_size):
        self.page_size = page_size
        self.pool = PagePool(NUM_PAGES)
        self.sequences = []
        self.queue = list(range(1, NUM_PAGES))
        self.holds = {}
        self.kept = {}

    def start_of(self, sequence, end):
        return sequence.salt, tuple(sequence.tokens[:end])

    def allocate(self, sequence, n):
        """Pages for `n` tokens, where there are enough."""
        missing = -(-n // self.page_size) - len(sequence.pages)
        if missing > len(self.queue):
            with pytest.raises(OutOfPages):
                self.pool.allocate(missing)
            return False
        pages = self.pool.allocate(missing)
        assert pages == self.queue[:missing], "not the least recently used"
        self.queue = self.queue[missing:]
        for page in pages:
            self.holds.pop(page, None)
        self.kept = {content: page for content, page in self.kept.items() if page not in pages}
        sequence.pages += pages
        return True

    @rule(salt=st.sampled_from(SALTS), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=10))
    def admit(self, salt, tokens):
        sequence = Sequence(Prefix(self.pool, self.page_size, salt), salt, tokens)
        longest = []
        for end in range(self.page_size, len(tokens), self.page_size):
            if (content := self.start_of(sequence, end)) not in self.kept:
                break
            longest.append(self.kept[content])
            assert self.holds[longest[-1]] == content
        sequence.pages = sequence.prefix.find(tokens)
        assert sequence.pages == longest
        self.pool.share(longest)
        self.queue = [page for page in self.queue if page not in longest]
        sequence.computed = len(longest) * self.page_size
        self.sequences.append(sequence)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), rows=st.integers(1, 7))
    def compute(self, data, rows):
        sequence = data.draw(st.sampled_from(self.sequences))
        begin = sequence.computed
        end = min(begin + rows, len(sequence.tokens))
        if not self.allocate(sequence, end):
            return
        for position in range(begin, end):
            page = sequence.pages[position // self.page_size]
            assert self.pool.ref_count(page) == 1, "a shared page is written"
            assert page not in self.kept.values(), "a page that others can find is written"
            self.holds[page] = self.start_of(sequence, position + 1)
        sequence.prefix.keep(sequence.pages, sequence.tokens, start=begin, end=end)
        sequence.computed = end
        for index in range(begin // self.page_size, end // self.page_size):
            self.kept.setdefault(self.start_of(sequence, (index + 1) * self.page_size), sequence.pages[index])

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=3))
    def grow(self, data, tokens):
        data.draw(st.sampled_from(self.sequences)).tokens += tokens

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def end(self, data):
        sequence = data.draw(st.sampled_from(self.sequences))
        self.sequences.remove(sequence)
        self.pool.release(reversed(sequence.pages))
        for page in reversed(sequence.pages):
            if not any(page in other.pages for other in self.sequences):
                self.queue.insert(len(self.queue) if page in self.kept.values() else 0, page)

    @invariant()
    def agrees(self):
        owned = [page for sequence in self.sequences for page in sequence.pages]
        assert [self.pool.ref_count(page) for page in range(1, NUM_PAGES)] == [
            owned.count(page) for page in range(1, NUM_PAGES)
        ]
        assert self.pool.num_free == len(self.queue)
        assert not set(owned) & set(self.queue)


PrefixAgainstModel.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPrefixAgainstModel = PrefixAgainstModel.TestCase
