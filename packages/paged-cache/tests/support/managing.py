"""Small page managers, common operations on them, and a check that a refused call changes nothing."""

import contextlib
import gc
import pickle
import sys
import tracemalloc
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from numpy.typing import ArrayLike

from paged_cache._src.manager import IndexedPage, PageManager, Prompt
from paged_cache._src.manager.prefix import PrefixIndex


def new_manager(num_pages: int = 33, page_size: int = 4, **options: Any) -> PageManager:
    """A manager for a few short sequences of up to 8 pages."""
    return PageManager(num_pages, page_size, **({"max_seqs": 6, "max_sequence_length": 8 * page_size} | options))


def computed(manager: PageManager, prompt: Prompt | ArrayLike, **options: Any) -> int:
    """Admit and commit a prompt; returns the sequence's id."""
    seq = manager.admit(prompt, **options)
    if left := int((manager.lengths(seq) - manager.computed(seq))[0]):
        manager.commit(seq, left)
    return seq


def ended(manager: PageManager, prompt: Prompt | ArrayLike, **options: Any) -> None:
    """Admit, commit and release a prompt."""
    manager.release(computed(manager, prompt, **options))


def write(manager: PageManager, seqs: ArrayLike, counts: ArrayLike, token_ids: ArrayLike) -> None:
    """Extend and commit sequences by these tokens."""
    manager.extend(seqs, counts, token_ids)
    manager.commit(seqs, counts)


def add(index: PrefixIndex, page: IndexedPage) -> bool:
    """Index a page; True if it was not indexed before."""
    if page.hash:
        return index.add(page.group, [page.page], [page.content]) == [page.page]
    return index.add_partial(page.group, page.page, page.content) == [page.page]


def table(manager: PageManager, seq: int, group: int = 0) -> list[int]:
    """The page table of a sequence, cut after its last page; 0 for released pages."""
    pages = manager.page_tables(seq)[group, 0].tolist()
    return pages[: 1 + max((at for at, page in enumerate(pages) if page), default=-1)]


@contextlib.contextmanager
def unchanged(thing: Any) -> Iterator[None]:
    """Check that the block does not change `thing`."""
    before = picture(thing)
    yield
    assert picture(thing) == before, "something has changed"


@contextlib.contextmanager
def refused(thing: Any, error: type[Exception], match: str) -> Iterator[pytest.ExceptionInfo]:
    """Check that the block raises this error and does not change `thing`."""
    with unchanged(thing), pytest.raises(error, match=match) as caught:
        yield caught


def cost(operation: Callable[[], Any]) -> tuple[int, int]:
    """The number of function calls of an operation, including built-in ones, and its peak memory in bytes."""
    calls = 0

    def count(frame: types.FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    gc.disable()  # a collection would call what others have hung on to it
    tracemalloc.start()
    sys.setprofile(count)
    try:
        operation()
    finally:
        sys.setprofile(None)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        gc.enable()
    return calls, peak


def picture(thing: Any) -> bytes:
    """The whole state of an object, except a manager's memory of its last lookup."""
    if isinstance(thing, PageManager):
        thing._seqs._last_lookup = None
    return pickle.dumps(thing)
