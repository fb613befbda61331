"""Takes in cached pages that another process or a file provides."""

from collections.abc import Sequence

import numpy as np

from paged_cache._src.manager.allocator import Allocator
from paged_cache._src.manager.prefix import HASH_BYTES, IndexedPage, hash_page
from paged_cache._src.manager.prompt import TOKEN_DTYPE


def restore(allocator: Allocator, cached: Sequence[IndexedPage]) -> np.ndarray:
    """Index these contents in empty pages, which become cached.

    Returns one page id per content; 0 if the content is already indexed or if no empty page is left.

    Raises:
        ValueError: a content does not fit this cache; nothing changes.
    """
    for each in cached:
        _check(allocator, each)
    contains = allocator.pages.index.contains
    num_new = sum(not contains(each.group, each.content) for each in cached)
    taken = allocator.pages.allocate(min(num_new, allocator.pages.pool.num_empty))
    pages, used = np.zeros(len(cached), np.int32), 0
    for at, each in enumerate(cached):
        if used < len(taken) and not contains(each.group, each.content):  # `cached` may hold a content twice
            pages[at] = taken[used]
            used += 1
            _add_to_index(allocator, each._replace(page=int(pages[at])))
    allocator.pages.release(taken[::-1])
    return pages


def _add_to_index(allocator: Allocator, cached: IndexedPage) -> None:
    if cached.hash:
        allocator.pages.add_to_index(cached.group, np.array([cached.page]), [cached.content])
    else:
        allocator.pages.add_partial_to_index(cached.group, cached.page, cached.content)


def _check(allocator: Allocator, cached: IndexedPage) -> None:
    """Refuse a content of another group or page size, or with a wrong hash."""
    if cached.group not in allocator.self_attention:
        raise ValueError(
            f"a cached page is of group {cached.group}; it must be one of the self-attention groups "
            f"{allocator.self_attention}"
        )
    num_tokens = len(cached.token_ids) / TOKEN_DTYPE.itemsize
    fits = num_tokens == allocator.page_size if cached.hash else num_tokens in range(1, allocator.page_size)
    if not fits:
        raise ValueError(
            f"a cached page holds {num_tokens:g} tokens, which does not fit page_size={allocator.page_size}; "
            "use a cache of the same page size"
        )
    if len(cached.parent_hash) != HASH_BYTES:
        raise ValueError(f"a cached page's parent_hash has {len(cached.parent_hash)} bytes; it must have {HASH_BYTES}")
    if np.frombuffer(cached.token_ids, TOKEN_DTYPE).min() < 0:
        raise ValueError("a cached page's token_ids hold a negative number; they must be 0 .. 2**31 - 1")
    if cached.media and not cached.hash:
        raise ValueError("a cached page that is not full has media; only full pages may, so leave it out")
    if cached.hash and cached.hash != hash_page(cached.parent_hash, cached.token_ids, cached.media):
        raise ValueError("a cached page's hash is not that of its tokens; it is damaged or foreign: save it again")
