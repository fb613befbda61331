"""The scenarios catch faults: the real page manager passes them, and a manager with any of these faults fails."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
from checked_manager import CheckedManager, Config
from failures import Failure
from scenarios import SCENARIOS

from paged_cache._src.manager import OutOfPages, PageManager, PagePool, cache_hit, prompt, sequences
from paged_cache._src.manager import allocator as allocator_module
from paged_cache._src.manager.allocator import Allocator
from paged_cache._src.manager.cache_hit import CacheHitSearch
from paged_cache._src.manager.moves import MoveLog
from paged_cache._src.manager.pages import Pages
from paged_cache._src.manager.prefix import PrefixIndex
from paged_cache._src.manager.sequences import Sequences

Fault = Callable[[pytest.MonkeyPatch], None]
FAULTS: dict[str, Fault] = {}


def fault_in(*owners: Any, of: str) -> Callable[[Callable], Callable]:
    """Replace the function `of` in these owners by the decorated one. Its first argument is the original."""

    def register(function: Callable) -> Callable:
        def plant(patch: pytest.MonkeyPatch) -> None:
            for owner in owners:
                original = getattr(owner, of)

                def faulty(*args: Any, original: Callable = original, **options: Any) -> Any:
                    return function(original, *args, **options)

                patch.setattr(owner, of, faulty)

        FAULTS[function.__name__] = plant
        return function

    return register


# Sharing, and copies on the first write


@fault_in(Allocator, of="_shared_tails")
def never_copies_on_write(original, allocator, indices):
    """A shared last page is written in place."""
    return []


@fault_in(Allocator, of="_shared_tails")
def copies_for_one_writer_only(original, allocator, indices):
    """If several sequences write a shared page in one call, only the first gets a copy."""
    return original(allocator, indices)[:1]


@fault_in(Allocator, of="_shared_tails")
def copies_in_the_first_group_only(original, allocator, indices):
    """Shared tails of the other groups are not copied."""
    return [(group, index) for group, index in original(allocator, indices) if group == 0]


@fault_in(Sequences, of="add_fork")
def fork_assumes_its_tail_is_private(original, seqs, index):
    """A sequence and its fork both assume that their tail page is private."""
    seq = original(seqs, index)
    seqs.has_private_tail[[index, seq % seqs.max_seqs]] = True
    return seq


@fault_in(Sequences, of="truncate")
def truncate_assumes_the_tail_is_private(original, seqs, index, length):
    """The new tail page, which may be shared or indexed, is assumed to be private."""
    original(seqs, index, length)
    seqs.has_private_tail[index] = True


@fault_in(Pages, of="copy")
def copies_the_wrong_page(original, pages, sources, targets):
    """The page before it."""
    original(pages, np.maximum(sources - 1, 1), targets)


@fault_in(Pages, of="copy")
def copies_nothing(original, pages, sources, targets):
    """The sequence gets an empty page."""


@fault_in(Allocator, of="_copy_tails")
def copied_page_is_not_released(original, allocator, groups, indices, copies):
    """The shared page is not released."""
    with mock.patch.object(allocator.pages, "release"):
        original(allocator, groups, indices, copies)


@fault_in(PageManager, of="fork")
def fork_does_not_raise_refcounts(original, manager, seq, n=1):
    """The new sequences' pages keep their old refcounts."""
    with mock.patch.object(manager._pages, "share"):
        return original(manager, seq, n)


@fault_in(Sequences, of="add_fork")
def forks_share_a_list(original, seqs, index):
    """The list of hashes is shared, not copied."""
    seq = original(seqs, index)
    seqs.hashes[seq % seqs.max_seqs] = seqs.hashes[index]
    return seq


# Releasing pages


@fault_in(Allocator, of="_release_spans")
def releases_twice(original, allocator, index, spans):
    """Shared pages are released twice."""
    pages = np.concatenate([allocator.seqs.page_tables[group, index, start:stop] for group, start, stop in spans])
    shared = pages[allocator.pages.pool.refcounts(pages) > 1]
    original(allocator, index, spans)
    allocator.pages.release(shared)


@fault_in(Sequences, of="truncate")
def truncate_keeps_old_hashes(original, seqs, index, length):
    """The hashes of removed pages stay, so new pages get wrong hashes."""
    keys = list(seqs.hashes[index])
    original(seqs, index, length)
    seqs.hashes[index] = keys


@fault_in(Allocator, of="truncate")
def truncate_keeps_a_page(original, allocator, index, num_tokens):
    """One page too many is kept."""
    give_back = allocator._release_spans

    def later(index, spans):
        give_back(index, [(group, min(start + 1, stop), stop) for group, start, stop in spans])

    with mock.patch.object(allocator, "_release_spans", later):
        original(allocator, index, num_tokens)


@fault_in(Allocator, of="release_out_of_window")
def window_releases_a_page_too_early(original, allocator, indices):
    """As if one page more were computed."""
    allocator.seqs.computed[indices] += allocator.page_size
    original(allocator, indices)
    allocator.seqs.computed[indices] -= allocator.page_size


@fault_in(Allocator, of="release_out_of_window")
def window_releases_nothing(original, allocator, indices):
    """Pages that no query sees are not released."""


@fault_in(Allocator, of="check_window")
def goes_back_behind_the_window(original, allocator, index, num_tokens):
    """Although the needed pages were released."""


# Cache hits


@fault_in(prompt, of="root_hash")
def reuse_across_namespaces(original, namespace, adapter):
    """Tenants share pages."""
    return original("", adapter)


@fault_in(prompt, of="root_hash")
def reuse_across_adapters(original, namespace, adapter):
    """A LoRA adapter changes nothing."""
    return original(namespace, "")


@fault_in(prompt, of="root_hash")
def names_run_together(original, namespace, adapter):
    """Namespace and adapter are not told apart."""
    return original(namespace + adapter, "")


@fault_in(prompt, sequences, cache_hit, allocator_module, of="media_bytes")
def media_are_not_hashed(original, media, start, stop):
    """Tokens of different pictures count as equal."""
    return b""


@fault_in(PrefixIndex, of="lookup")
def lookup_compares_only_the_hash(original, index, group, content):
    """Lookup compares only the hash."""
    return index._page_of_hash[group].get(content[0], 0)


@fault_in(CacheHitSearch, of="longest")
def reuses_one_token_too_many(original, search, limit):
    """Nothing is left to compute."""
    return original(search, limit + 1)


@fault_in(PrefixIndex, of="lookup_partial")
def partial_page_one_token_too_far(original, index, group, parent, token_ids):
    """The first token that differs is taken for the same."""
    page, num_tokens = original(index, group, parent, token_ids)
    return page, min(num_tokens + 1, len(token_ids) // 4) if page else 0


@fault_in(CacheHitSearch, of="_with_whole_window")
def reuses_half_a_window(original, search, group, most):
    """The pages of the window are not looked up."""
    return most


@fault_in(Pages, of="remove_from_index")
def rewritten_page_stays_indexed(original, pages, rewritten):
    """A page that is rewritten stays in the index."""


@fault_in(Allocator, of="index_full_pages")
def commit_indexes_a_partial_page(original, allocator, full):
    """A page that is still being written is indexed."""
    original(allocator, full)
    for index in set(full.places[0].tolist()):
        allocator.index_partial_page(index)


@fault_in(Sequences, of="page_token_bytes")
def pages_with_unknown_tokens_are_hashed(original, seqs, places):
    """A page with unknown tokens gets a hash."""
    pages = seqs.token_ids.reshape(seqs.max_seqs, -1, seqs.page_size)[places]
    return [page.tobytes() for page in pages]


@fault_in(Pages, of="_remove_from_index")
def evicted_pages_stay_indexed(original, pages, forgotten, kind):
    """An evicted page stays in the index."""
    if kind != "evicted":
        original(pages, forgotten, kind)


@fault_in(Sequences, of="clear_hashes")
def reset_keeps_the_hashes_of_sequences(original, seqs):
    """Sequences go on adding pages to the index."""


@fault_in(Allocator, of="can_reuse")
def cross_attention_is_not_hashed(original, allocator, prompt):
    """A prompt hits pages that were computed with another text."""
    return True


# The pool


@fault_in(PagePool, of="share")
def evicts_a_page_in_use(original, pool, pages, times=1):
    """A shared page stays in the eviction queue."""
    queue = dict(pool._cached)
    original(pool, pages, times)
    pool._cached.update({page: None for page in queue if page not in pool._cached})


@fault_in(PageManager, of="pin")
def pin_holds_nothing(original, manager, prompt):
    """A pin does not raise refcounts."""
    with mock.patch.object(manager._pages, "share"):
        return original(manager, prompt)


@fault_in(PagePool, of="allocate")
def takes_what_there_is(original, pool, n):
    """Running out of pages, it has taken some."""
    try:
        return original(pool, n)
    except OutOfPages:
        original(pool, pool.num_free)
        raise


@fault_in(Sequences, of="_find_indices")
def stops_half_way(original, seqs, ids):
    """Ids that do not exist are passed over."""
    return original(seqs, ids[np.isin(ids, seqs._ids)])


@fault_in(Sequences, of="_new_index")
def gives_an_id_twice(original, seqs):
    """The next sequence at an index gets the same id."""
    index, seq = original(seqs)
    seqs._next_ids[index] = seq
    return index, seq


# Moves


@fault_in(MoveLog, of="take")
def one_phase_for_a_chain(original, log):
    """What is read after it was written is read before."""
    phases = original(log)
    if not phases:
        return []
    fields = {name: np.concatenate([getattr(phase, name) for phase in phases]) for name in vars(phases[0])}
    return [type(phases[0])(**fields)]


@fault_in(Pages, of="_zero")
def scrubs_nothing(original, pages, emptied):
    """A page goes from tenant to tenant as it is."""


@fault_in(Pages, of="allocate")
def does_not_scrub_what_it_evicts(original, pages, n):
    """Only released pages are zeroed."""
    with mock.patch.object(pages, "_zero"):
        return original(pages, n)


@fault_in(Pages, of="release")
def does_not_scrub_what_is_released(original, pages, released):
    """Only evicted pages are zeroed."""
    with mock.patch.object(pages, "_zero"):
        original(pages, released)


@fault_in(Allocator, of="swap_out")
def scrubs_before_it_swaps_out(original, allocator, index, host_pages):
    """The host gets zeros."""
    allocator.pages._zero(np.concatenate(allocator.pages_of(index)))
    original(allocator, index, host_pages)


@fault_in(Allocator, of="swap_in")
def swaps_in_backwards(original, allocator, index, pages):
    """The last page comes first."""
    allocator.seqs.host_pages[index] = allocator.seqs.host_pages[index][::-1].copy()
    return original(allocator, index, pages)


@fault_in(PageManager, of="swap_in")
def keeps_its_host_pages(original, manager, seq):
    """They are never free again."""
    with mock.patch.object(manager._host_pool, "release"):
        original(manager, seq)


@fault_in(Allocator, of="unused_slots")
def counts_slots_of_a_longer_sequence(original, allocator):
    """A shared page counts from the shorter sequence."""
    pages, filled = allocator._partial_pages()
    _, first = np.unique(pages, return_index=True)
    return int((allocator.page_size - filled[first]).sum())


def checked_manager(**config: Any) -> CheckedManager:
    return CheckedManager(Config(**config))


def run_all() -> None:
    """Raises an error at the first operation after which something does not hold."""
    for scenario in SCENARIOS.values():
        scenario(checked_manager)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_manager_is_right(scenario):
    SCENARIOS[scenario](checked_manager)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_failure_at_any_call_changes_nothing(scenario):
    def start(**config: Any) -> CheckedManager:
        started.append(checked_manager(**config))
        started[-1].failures = [Failure("pages", 0), *(Failure("hash", at) for at in range(4))]
        return started[-1]

    started: list[CheckedManager] = []
    SCENARIOS[scenario](start)
    assert started[0].failed > 4


@pytest.mark.once
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(fault, monkeypatch):
    FAULTS[fault](monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        run_all()
