"""Runs the workloads on `PageManager`, with the packing and the transfer of its page tables."""

import itertools
from collections.abc import Callable, Iterator

import jax
import numpy as np

from cache_costing.workloads import PAGE_SIZE, Laps, Turn, Workload, tokens_of
from paged_cache import BatchShapes, PageManager


def manager_of(work: Workload) -> PageManager:
    """Returns a manager with prefix reuse and one layer group of full attention."""
    host_pages = 2 * work.pages_per_seq if work.kind == "swap" else 0
    return PageManager(
        work.num_pages,
        PAGE_SIZE,
        max_seqs=work.seqs + 1,
        max_sequence_length=work.tokens,
        num_host_pages=host_pages,
    )


def computed(manager: PageManager, tokens: list[int]) -> int:
    """Returns a sequence whose prompt is computed and whose full pages are indexed."""
    seq = manager.admit(tokens)
    manager.commit(seq, len(tokens) - int(manager.computed(seq)[0]))
    manager.take_moves()
    return seq


def decode(work: Workload) -> Turn:
    """Returns a turn of decode steps, with one token for each running sequence."""
    manager = manager_of(work)
    seqs = np.array([computed(manager, work.running(number)) for number in range(work.seqs)])
    shapes = BatchShapes(tokens=(work.seqs,), max_seqs=work.seqs, pages_per_seq=work.pages_per_seq)

    def turn() -> dict[str, float]:
        sampled = np.array(tokens_of(int(manager.lengths(seqs)[0]), work.seqs), np.int32)
        for laps in (Laps(), Laps()):  # the first round is not counted
            laps()
            for _ in range(work.times):
                manager.extend(seqs, 1, sampled)
                laps("extend")
                packed = shapes.pack_seqs(manager, seqs, sampled)
                manager.take_moves()
                laps("metadata")
                manager.commit(seqs)
                laps("commit")
        for _ in range(work.times):
            laps()
            jax.block_until_ready(jax.device_put(packed))
            laps("transfer", by_clock=True)
        return laps.over(work.operations)

    return turn


def admissions(work: Workload, manager: PageManager, numbers: Iterator[int], expected: int) -> Turn:
    """Returns a turn that admits, computes and releases prompts. Each must have `expected` cache hits in full pages."""

    def turn() -> dict[str, float]:
        laps = Laps()
        for number in itertools.islice(numbers, work.times):
            tokens = work.prompt(number)
            laps()
            seq = manager.admit(tokens)
            manager.page_tables(seq)
            hits = int(manager.computed(seq)[0])
            manager.take_moves()
            laps("admit")
            manager.commit(seq, len(tokens) - hits)
            laps("commit")
            manager.release(seq)
            laps("release")
            if hits // PAGE_SIZE * PAGE_SIZE != expected:
                raise ValueError(f"{work.name}: {hits} tokens are cache hits, but {expected} should be")
        return laps.over(work.operations)

    return turn


def admit_new(work: Workload) -> Turn:
    """Returns a turn of prompts that are new each time."""
    return admissions(work, manager_of(work), itertools.count(), 0)


def admit_again(work: Workload) -> Turn:
    """Returns a turn that admits the same prompt each time."""
    manager = manager_of(work)
    manager.release(computed(manager, work.prompt(0)))
    return admissions(work, manager, itertools.repeat(0), (work.tokens - 1) // PAGE_SIZE * PAGE_SIZE)


def churn(work: Workload) -> Turn:
    """Returns a turn of new prompts while every free page is cached, so that pages are evicted."""
    manager = manager_of(work)
    prompts = work.num_pages // work.pages_per_seq + 1
    for number in range(prompts):
        manager.release(computed(manager, work.prompt(number)))
    return admissions(work, manager, itertools.count(prompts), 0)


def fork(work: Workload) -> Turn:
    """Returns a turn of forks. Each fork gets one token, for which its last page is copied, and is released."""
    manager = manager_of(work)
    parent = computed(manager, work.prompt(0)[:-1])

    def turn() -> dict[str, float]:
        laps = Laps()
        for _ in range(work.times):
            (child,) = manager.fork(parent)
            laps("fork")
            manager.extend(child)
            manager.take_moves()
            laps("extend")
            manager.release(child)
            laps("release")
        return laps.over(work.operations)

    return turn


def swap(work: Workload) -> Turn:
    """Returns a turn that swaps a sequence out and in again."""
    manager = manager_of(work)
    seq = computed(manager, work.prompt(0))

    def turn() -> dict[str, float]:
        laps = Laps()
        for _ in range(work.times):
            manager.swap_out(seq)
            manager.take_moves()
            laps("out")
            manager.swap_in(seq)
            manager.take_moves()
            laps("in")
        return laps.over(work.operations)

    return turn


KINDS: dict[str, Callable[[Workload], Turn]] = {
    "decode": decode,
    "admit": admit_new,
    "hit": admit_again,
    "churn": churn,
    "fork": fork,
    "swap": swap,
}


def prepare(work: Workload) -> Turn:
    """Prepare a workload. Returns one turn of it."""
    return KINDS[work.kind](work)
