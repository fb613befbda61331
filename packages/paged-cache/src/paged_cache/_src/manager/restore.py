"""Pages whose content comes from elsewhere: another process, or a file."""

from collections.abc import Sequence

import numpy as np

from paged_cache._src.manager.holdings import Holdings
from paged_cache._src.manager.prefix import KeptPage, page_key
from paged_cache._src.manager.prompt import TOKEN_DTYPE


def restore(held: Holdings, kept: Sequence[KeptPage]) -> np.ndarray:
    """A free page for each content that is not here yet, while there are empty ones, and 0 for the others.

    Raises:
        ValueError: a content is not one that this cache could hold; nothing changes.
    """
    for content in kept:
        _check(held, content)
    has = held.pages.index.has
    wanted = sum(not has(content.group, content.content) for content in kept)
    taken = held.pages.allocate(min(wanted, held.pages.pool.num_empty))
    pages, used = np.zeros(len(kept), np.int32), 0
    for at, content in enumerate(kept):
        if used < len(taken) and not has(content.group, content.content):  # not the same content twice
            pages[at] = taken[used]
            used += 1
            _keep(held, content._replace(page=int(pages[at])))
    held.pages.release(taken[::-1])
    return pages


def _keep(held: Holdings, content: KeptPage) -> None:
    if content.key:
        held.pages.keep(content.group, np.array([content.page]), [content.content])
    else:
        held.pages.keep_partial(content.group, content.page, content.content)


def _check(held: Holdings, content: KeptPage) -> None:
    if content.group not in held.growing:
        raise ValueError(f"a kept page is of group {content.group}; it must be one of {held.growing}, which grow")
    num_tokens = len(content.token_ids) / TOKEN_DTYPE.itemsize
    fits = num_tokens == held.page_size if content.key else num_tokens in range(1, held.page_size)
    if not fits:
        raise ValueError(f"a kept page holds {num_tokens:g} tokens, which does not fit page_size={held.page_size}")
    if content.key and content.key != page_key(content.parent, content.token_ids, content.media):
        raise ValueError("a kept page's key is not that of its tokens; it is corrupt or was made by something else")
