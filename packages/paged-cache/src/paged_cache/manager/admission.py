"""What a prompt finds in pages, and whether there are pages for the rest of it."""

import numpy as np

from paged_cache.manager.holdings import Holdings
from paged_cache.manager.pool import OutOfPages
from paged_cache.manager.reuse import Admission, Prompt, Reuse


def plan_admission(held: Holdings, prompt: Prompt, reuse: Reuse, *, chunk: int | None, cross_tokens: int) -> Admission:
    """The prompt with slots for `chunk` tokens after the reused ones; without the tail if there is no page for it.

    A found page that is free must not be evicted for the others, so it counts as taken.

    Raises:
        OutOfPages: not enough pages are free.
    """
    num_tokens, needed, free = len(prompt.token_ids), 0, 0
    for each in (reuse, reuse.without_tail(held.page_size)):
        length = num_tokens if chunk is None else min(num_tokens, each.num_tokens + chunk)
        grown = (held.num_pages(length) - each.num_pages) * len(held.growing)
        needed = grown + held.num_pages(cross_tokens) * len(held.cross)
        found = np.concatenate([*each.pages, each.tails])
        free = held.pages.pool.num_free - int((held.pages.pool.owners(found) == 0).sum())
        if needed <= free:
            return Admission(prompt, each, length, cross_tokens)
    raise OutOfPages(asked=needed, free=free)
