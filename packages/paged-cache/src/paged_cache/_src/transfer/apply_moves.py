"""Carries out on the devices what the page manager has decided: pages copied, zeroed, swapped out and swapped in."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Array, Int32

from paged_cache._src.cache.cache import PagedAttentionCache
from paged_cache._src.manager.moves import PageMoves
from paged_cache._src.transfer.contents import (
    compile_contents,
    on_devices,
    padded,
    padded_sizes,
    put,
    read_contents,
    sent,
    staging_slices,
    take,
    with_pages,
    write_contents,
)
from paged_cache._src.transfer.host_pages import Held, HostPages
from paged_kernels import KVPages

Phase = Sequence[PageMoves]
"""What each replica does at the same time."""

_NOTHING = PageMoves(**{field.name: np.empty(0, np.int32) for field in dataclasses.fields(PageMoves)})


def apply_moves(
    cache: PagedAttentionCache, moves: Sequence[PageMoves], host: HostPages | None = None
) -> PagedAttentionCache:
    """The cache after these moves, phase by phase; in a phase every page is read before any is written.

    The cache is donated: its pages are written in place, and the caller goes on with the result. One compiled call
    copies and zeroes the pages of all layers; swapping takes one more for every `STAGED_PAGES` pages, each way. Without
    moves nothing is called. `warm_up_moves` compiles all of them beforehand.

    Args:
        cache: the pages of all layers.
        moves: what `PageManager.take_moves` has returned.
        host: where pages are swapped to and from, the same each time; `None` if none are.

    Raises:
        ValueError: an id is no page's, pages are swapped without `host`, or the cache has replicas. Nothing has been
            done then. A host page that is to be read holds nothing.
    """
    return apply_moves_by_replica(cache, [moves], host)


def apply_moves_by_replica(
    cache: PagedAttentionCache, moves: Sequence[Sequence[PageMoves]], host: HostPages | None = None
) -> PagedAttentionCache:
    """As `apply_moves`, with a list of moves for each replica, all of them at once.

    Raises:
        ValueError: as `apply_moves`, or there is not one list for each replica.
    """
    if len(moves) != (groups := cache.views[0].replicas):
        raise ValueError(
            f"there are moves of {len(moves)} replicas, but the cache has {groups}; give apply_moves_by_replica one "
            "list for each"
        )
    # Groups share no page, so that any order between their phases is right.
    phases = list(itertools.zip_longest(*moves, fillvalue=_NOTHING))
    for phase in phases:
        _check(cache, phase, host)
    for phase in phases:
        cache = _apply(cache, phase, host)
    return cache


def moves_of_one(cache: PagedAttentionCache, moves: Sequence[PageMoves], replica: int) -> list[Sequence[PageMoves]]:
    """What `apply_moves_by_replica` takes where only one replica has moves."""
    return [moves if group == replica else [] for group in range(cache.views[0].replicas)]


def warm_up_moves(cache: PagedAttentionCache, most: int, host: HostPages | None = None) -> PagedAttentionCache:
    """The same pages, once all is compiled that phases which copy and zero up to `most` pages need.

    With `host`, also what swapping needs, of any number of pages. The cache is donated.
    """
    for size in padded_sizes(most):
        cache = _copy(cache, sent(cache, np.zeros((cache.views[0].replicas, 2, size), np.int32)))
    return cache if host is None else compile_contents(cache)


def _check(cache: PagedAttentionCache, phase: Phase, host: HostPages | None) -> None:
    view = cache.views[0]
    num_pages = view.pages.num_pages // view.replicas
    swaps = any(len(moves.out_to) or len(moves.in_from) for moves in phase)
    if swaps and host is None:
        raise ValueError("moves swap pages, but host is None; pass a HostPages, the same one each time")
    for moves in phase:
        for name in ("copy_from", "copy_to", "zero", "out_from", "in_to"):
            _check_ids(name, getattr(moves, name), num_pages)
        if host is not None:
            _check_ids("out_to", moves.out_to, host.num_pages + 1)
            _check_ids("in_from", moves.in_from, host.num_pages + 1)


def _check_ids(name: str, ids: np.ndarray, num_pages: int) -> None:
    outside = (ids < 1) | (ids >= num_pages)
    if outside.any():
        raise ValueError(
            f"{name} holds {ids[outside.argmax()]}, but pages are 1..{num_pages - 1}; the manager and the cache must "
            "have the same num_pages, and the manager and HostPages the same num_host_pages"
        )


def _apply(cache: PagedAttentionCache, phase: Phase, host: HostPages | None) -> PagedAttentionCache:
    """Swaps out, copies, swaps in: pages are read before they are written, on the host as on the devices."""
    copies = _stack(phase, _copies)
    arriving = _stack(phase, lambda moves: np.stack([moves.in_from, moves.in_to]))
    held = [] if host is None else host.held(arriving[:, 0])
    if host is not None:
        _swap_out(cache, _stack(phase, lambda moves: np.stack([moves.out_from, moves.out_to])), host)
    if copies.size:
        cache = _copy(cache, sent(cache, padded(copies)))
    return cache if host is None else _swap_in(cache, arriving[:, 1], host, held)


def _copies(moves: PageMoves) -> Int32[np.ndarray, "2 n"]:
    """Pages to read and to write; a page of zeros is a copy of the null page."""
    source = np.concatenate([moves.copy_from, np.zeros_like(moves.zero)])
    return np.stack([source, np.concatenate([moves.copy_to, moves.zero])])


def _stack(phase: Phase, pairs: Callable[[PageMoves], np.ndarray]) -> Int32[np.ndarray, "groups 2 n"]:
    """The ids of all groups, with null pages where one has fewer."""
    each = [pairs(moves) for moves in phase]
    n = max(ids.shape[1] for ids in each)
    return np.stack([np.pad(ids, [(0, 0), (0, n - ids.shape[1])]) for ids in each])


def _swap_out(cache: PagedAttentionCache, leaving: Int32[np.ndarray, "groups 2 n"], host: HostPages) -> None:
    n = leaving.shape[2]
    for chunk in staging_slices(n):
        copies = host.store(leaving[:, 1, chunk], read_contents(cache, leaving[:, 0, chunk]))
        if chunk.stop < n:  # else the next contents would need memory beside these
            jax.block_until_ready(copies)


def _swap_in(
    cache: PagedAttentionCache, page_ids: Int32[np.ndarray, "replicas n"], host: HostPages, held: list[Held]
) -> PagedAttentionCache:
    for chunk in staging_slices(len(held)):
        cache = write_contents(cache, page_ids[:, chunk], host.to_devices(held[chunk]))
        if chunk.stop < len(held):
            jax.block_until_ready(cache)
    return cache


def _copy_all(cache: PagedAttentionCache, ids: Int32[Array, "groups 2 n"]) -> PagedAttentionCache:
    def part(views: list[KVPages], ids: Array) -> list[KVPages]:
        return jax.tree.map(lambda array: put(array, ids[1], take(array, ids[0])), views)

    return with_pages(cache, on_devices(part, cache, ids))


_copy = jax.jit(_copy_all, donate_argnums=0)
