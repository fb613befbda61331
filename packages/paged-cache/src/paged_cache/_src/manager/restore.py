"""Pages whose content comes from elsewhere: another process, or a file."""

from collections.abc import Sequence

import numpy as np

from paged_cache._src.manager.allocator import Allocator
from paged_cache._src.manager.prefix import CachedPage, hash_page
from paged_cache._src.manager.prompt import TOKEN_DTYPE


def restore(allocator: Allocator, kept: Sequence[CachedPage]) -> np.ndarray:
    """A free page for each content that is not here yet, while there are empty ones, and 0 for the others.

    Raises:
        ValueError: a content is not one that this cache could hold; nothing changes.
    """
    for content in kept:
        _check(allocator, content)
    has = allocator.pages.index.contains
    wanted = sum(not has(content.group, content.content) for content in kept)
    taken = allocator.pages.allocate(min(wanted, allocator.pages.pool.num_empty))
    pages, used = np.zeros(len(kept), np.int32), 0
    for at, content in enumerate(kept):
        if used < len(taken) and not has(content.group, content.content):  # not the same content twice
            pages[at] = taken[used]
            used += 1
            _keep(allocator, content._replace(page=int(pages[at])))
    allocator.pages.release(taken[::-1])
    return pages


def _keep(allocator: Allocator, content: CachedPage) -> None:
    if content.hash:
        allocator.pages.add_to_index(content.group, np.array([content.page]), [content.content])
    else:
        allocator.pages.add_partial_to_index(content.group, content.page, content.content)


def _check(allocator: Allocator, content: CachedPage) -> None:
    if content.group not in allocator.self_attention:
        raise ValueError(
            f"a cached page is of group {content.group}; it must be one of the self-attention "
            f"groups {allocator.self_attention}"
        )
    num_tokens = len(content.token_ids) / TOKEN_DTYPE.itemsize
    fits = num_tokens == allocator.page_size if content.hash else num_tokens in range(1, allocator.page_size)
    if not fits:
        raise ValueError(
            f"a cached page holds {num_tokens:g} tokens, which does not fit page_size={allocator.page_size}"
        )
    if content.hash and content.hash != hash_page(content.parent_hash, content.token_ids, content.media):
        raise ValueError("a cached page's hash is not that of its tokens; it is corrupt or was made by something else")
