"""Small page managers, the usual ways to use one, and proof that a refused call changes nothing."""

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

from paged_cache._src.manager import CachedPage, PageManager, Prompt
from paged_cache._src.manager.prefix import PrefixIndex


def new_manager(num_pages: int = 33, page_size: int = 4, **options: Any) -> PageManager:
    """A manager of few short sequences, up to 8 pages each."""
    return PageManager(num_pages, page_size, **({"max_seqs": 6, "max_sequence_length": 8 * page_size} | options))


def computed(manager: PageManager, prompt: Prompt | ArrayLike, **options: Any) -> int:
    """A sequence whose prompt is computed."""
    seq = manager.admit(prompt, **options)
    if left := int((manager.lengths(seq) - manager.computed(seq))[0]):
        manager.commit(seq, left)
    return seq


def ended(manager: PageManager, prompt: Prompt | ArrayLike, **options: Any) -> None:
    """What a sequence leaves behind."""
    manager.release(computed(manager, prompt, **options))


def write(manager: PageManager, seqs: ArrayLike, counts: ArrayLike, token_ids: ArrayLike) -> None:
    """Some sequences go on with these tokens."""
    manager.extend(seqs, counts, token_ids)
    manager.commit(seqs, counts)


def add(index: PrefixIndex, page: CachedPage) -> bool:
    """Let a page be found; whether it could not before."""
    if page.hash:
        return index.add(page.group, [page.page], [page.content]) == [page.page]
    return index.add_partial(page.group, page.page, page.content) == [page.page]


def table(manager: PageManager, seq: int, group: int = 0) -> list[int]:
    """The pages of a sequence, with zeros for those it has no more, and none behind its last."""
    pages = manager.page_tables(seq)[group, 0].tolist()
    return pages[: 1 + max((at for at, page in enumerate(pages) if page), default=-1)]


@contextlib.contextmanager
def unchanged(thing: Any) -> Iterator[None]:
    """Nothing of this has changed at the end."""
    before = picture(thing)
    yield
    assert picture(thing) == before, "something has changed"


@contextlib.contextmanager
def refused(thing: Any, error: type[Exception], match: str) -> Iterator[pytest.ExceptionInfo]:
    """A call raises this, and changes nothing of `thing`."""
    with unchanged(thing), pytest.raises(error, match=match) as caught:
        yield caught


def cost(operation: Callable[[], Any]) -> tuple[int, int]:
    """How many functions an operation calls, numpy's and the interpreter's included, and the bytes that it needs."""
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
    """All that an object holds, but for the answer that a manager remembers, which asking changes."""
    if isinstance(thing, PageManager):
        thing._seqs._last_lookup = None
    return pickle.dumps(thing)
