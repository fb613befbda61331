"""Decides if there are enough free pages to admit a prompt."""

import numpy as np

from paged_cache._src.manager.allocator import Allocator
from paged_cache._src.manager.cache_hit import Admission, CacheHit
from paged_cache._src.manager.pool import OutOfPages
from paged_cache._src.manager.prompt import Prompt


def plan_admission(allocator: Allocator, prompt: Prompt, hit: CacheHit, *, chunk: int, cross_tokens: int) -> Admission:
    """Plan slots for the cache hit and for `chunk` more tokens of the prompt.

    If the pages do not suffice, the plan drops the hit's tail, since copying the tail takes pages too.

    Raises:
        OutOfPages: not enough pages are free, even without the tail.
    """
    needed, free = 0, 0
    for each in (hit, hit.without_tail(allocator.page_size)):
        length = min(len(prompt), each.num_tokens + chunk)
        needed = num_new_pages(allocator, each, length, cross_tokens)
        free = allocator.pages.pool.num_free - num_cached_pages(allocator, each)
        if needed <= free:
            return Admission(prompt, each, length, cross_tokens)
    raise OutOfPages(asked=needed, free=free)


def pages_to_admit(allocator: Allocator, prompt: Prompt, hit: CacheHit, *, chunk: int | None, cross_tokens: int) -> int:
    """The number of free pages that `admit` and later calls of `extend` take for a whole prompt, with cached pages.

    With `chunk`, a windowed group takes at most the pages that it holds at once, since it releases pages as it goes.
    """
    new_pages = allocator.num_pages(len(prompt)) - hit.num_pages
    total = allocator.num_pages(cross_tokens) * len(allocator.cross_attention)
    for group in allocator.self_attention:
        pages = new_pages + int((allocator.pages.pool.refcounts(hit.pages[group]) == 0).sum())
        if chunk is not None:
            pages = min(pages, allocator.groups[group].most_pages(len(prompt), chunk, allocator.page_size))
        total += pages
    return total


def num_new_pages(allocator: Allocator, hit: CacheHit, length: int, cross_tokens: int) -> int:
    """The number of pages to allocate for `length` tokens of a prompt, besides the pages of the cache hit."""
    per_group = allocator.num_pages(length) - hit.num_pages
    num_cross = allocator.num_pages(cross_tokens) * len(allocator.cross_attention)
    return per_group * len(allocator.self_attention) + num_cross


def num_cached_pages(allocator: Allocator, hit: CacheHit) -> int:
    """The number of the hit's pages that are free now. The new sequence needs them, so they cannot be evicted."""
    pages = np.concatenate([*hit.pages, hit.tails])
    return int((allocator.pages.pool.refcounts(pages) == 0).sum())
