"""Whether there are pages for a prompt, beside those in which its start is found."""

import numpy as np

from paged_cache._src.manager.allocator import Allocator
from paged_cache._src.manager.cache_hit import Admission, CacheHit
from paged_cache._src.manager.pool import OutOfPages
from paged_cache._src.manager.prompt import Prompt


def plan_admission(allocator: Allocator, prompt: Prompt, hit: CacheHit, *, chunk: int, cross_tokens: int) -> Admission:
    """The prompt with slots for `chunk` tokens after the reused ones; without the tail if there is no page for it.

    Raises:
        OutOfPages: not enough pages are free.
    """
    needed, free = 0, 0
    for each in (hit, hit.without_tail(allocator.page_size)):
        length = min(len(prompt), each.num_tokens + chunk)
        needed = num_new_pages(allocator, each, length, cross_tokens)
        free = allocator.pages.pool.num_free - num_cached_pages(allocator, each)
        if needed <= free:
            return Admission(prompt, each, length, cross_tokens)
    raise OutOfPages(asked=needed, free=free)


def num_new_pages(allocator: Allocator, hit: CacheHit, length: int, cross_tokens: int) -> int:
    """Pages for so many tokens of a prompt, beside those that are found."""
    grown = allocator.num_pages(length) - hit.num_pages
    return grown * len(allocator.self_attention) + allocator.num_pages(cross_tokens) * len(allocator.cross_attention)


def num_cached_pages(allocator: Allocator, hit: CacheHit) -> int:
    """Found pages that are free: a new sequence takes these too, so they cannot be evicted for its other pages."""
    found = np.concatenate([*hit.pages, hit.tails])
    return int((allocator.pages.pool.refcounts(found) == 0).sum())
