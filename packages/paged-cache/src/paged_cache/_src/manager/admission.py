"""Whether there are pages for a prompt, beside those in which its start is found."""

import numpy as np

from paged_cache._src.manager.holdings import Holdings
from paged_cache._src.manager.pool import OutOfPages
from paged_cache._src.manager.prompt import Prompt
from paged_cache._src.manager.reuse import Admission, Reuse


def plan_admission(held: Holdings, prompt: Prompt, reuse: Reuse, *, chunk: int, cross_tokens: int) -> Admission:
    """The prompt with slots for `chunk` tokens after the reused ones; without the tail if there is no page for it.

    Raises:
        OutOfPages: not enough pages are free.
    """
    needed, free = 0, 0
    for each in (reuse, reuse.without_tail(held.page_size)):
        length = min(len(prompt), each.num_tokens + chunk)
        needed = new_pages(held, each, length, cross_tokens)
        free = held.pages.pool.num_free - free_pages_found(held, each)
        if needed <= free:
            return Admission(prompt, each, length, cross_tokens)
    raise OutOfPages(asked=needed, free=free)


def new_pages(held: Holdings, reuse: Reuse, length: int, cross_tokens: int) -> int:
    """Pages for so many tokens of a prompt, beside those that are found."""
    grown = held.num_pages(length) - reuse.num_pages
    return grown * len(held.growing) + held.num_pages(cross_tokens) * len(held.cross)


def free_pages_found(held: Holdings, reuse: Reuse) -> int:
    """Found pages that are free: a new sequence takes these too, so they cannot be evicted for its other pages."""
    found = np.concatenate([*reuse.pages, reuse.tails])
    return int((held.pages.pool.owners(found) == 0).sum())
