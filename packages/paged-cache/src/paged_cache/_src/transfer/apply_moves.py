"""Makes the page manager's moves on the devices: copies, zeroes, swaps out and swaps in."""

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
    pad_ids,
    padded_sizes,
    put,
    read_contents,
    send_ids,
    staging_slices,
    take,
    with_pages,
    write_contents,
)
from paged_cache._src.transfer.host_pages import HostContent, HostPages
from paged_kernels import KVPages

Phase = Sequence[PageMoves]
"""The moves of each replica that run at the same time."""

_NOTHING = PageMoves(**{field.name: np.empty(0, np.int32) for field in dataclasses.fields(PageMoves)})


def apply_moves(
    cache: PagedAttentionCache, moves: Sequence[PageMoves], host: HostPages | None = None
) -> PagedAttentionCache:
    """Make these moves, phase by phase, and return the cache. In a phase, all reads come before all writes.

    The cache is donated: its pages are written in place, and the caller must use the result. One compiled call copies
    and zeroes pages of all layers. Swapping takes another call per `STAGED_PAGES` pages and direction. Without moves
    there is no call. `warm_up_moves` compiles the calls beforehand.

    Args:
        cache: the pages of all layers.
        moves: the result of `PageManager.take_moves`.
        host: the host pages for swapping, the same object each time; `None` without swapping.

    Raises:
        ValueError: a page id does not exist, pages are swapped without `host`, the cache has several replicas, or it
            was donated to an earlier call; nothing is changed then. Or a host page that is read has never been written.
    """
    return apply_moves_by_replica(cache, [moves], host)


def apply_moves_by_replica(
    cache: PagedAttentionCache, moves: Sequence[Sequence[PageMoves]], host: HostPages | None = None
) -> PagedAttentionCache:
    """As `apply_moves`, with one list of moves per replica. All replicas move at the same time.

    Raises:
        ValueError: as `apply_moves`, or there is not one list for each replica.
    """
    if len(moves) != (replicas := cache.views[0].replicas):
        raise ValueError(
            f"there are moves of {len(moves)} replicas, but the cache has {replicas}; give apply_moves_by_replica one "
            "list for each"
        )
    cache.check_not_donated()
    # Replicas share no page, so their phases may run in any order.
    phases = list(itertools.zip_longest(*moves, fillvalue=_NOTHING))
    for phase in phases:
        _check(cache, phase, host)
    for phase in phases:
        cache = _apply(cache, phase, host)
    return cache


def moves_of_one(cache: PagedAttentionCache, moves: Sequence[PageMoves], replica: int) -> list[Sequence[PageMoves]]:
    """The lists for `apply_moves_by_replica` when only one replica has moves."""
    return [moves if each == replica else [] for each in range(cache.views[0].replicas)]


def warm_up_moves(cache: PagedAttentionCache, most: int, host: HostPages | None = None) -> PagedAttentionCache:
    """Compile copies of up to `most` pages; the cache is donated and returned unchanged.

    With `host`, also compiles swapping, for any number of pages.
    """
    cache.check_not_donated()
    for size in padded_sizes(most):
        cache = _copy(cache, send_ids(cache, np.zeros((cache.views[0].replicas, 2, size), np.int32)))
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
    """Make one phase: take snapshots of the host pages to read, swap out, copy, swap in."""
    copies = _stack(phase, _copies)
    arriving = _stack(phase, lambda moves: np.stack([moves.in_from, moves.in_to]))
    snapshots = [] if host is None else host.snapshot(arriving[:, 0])
    if host is not None:
        _swap_out(cache, _stack(phase, lambda moves: np.stack([moves.out_from, moves.out_to])), host)
    if copies.size:
        cache = _copy(cache, send_ids(cache, pad_ids(copies)))
    return cache if host is None else _swap_in(cache, arriving[:, 1], host, snapshots)


def _copies(moves: PageMoves) -> Int32[np.ndarray, "2 n"]:
    """Page ids to read and to write. Zeroing a page is a copy of the null page."""
    source = np.concatenate([moves.copy_from, np.zeros_like(moves.zero)])
    return np.stack([source, np.concatenate([moves.copy_to, moves.zero])])


def _stack(phase: Phase, pairs: Callable[[PageMoves], np.ndarray]) -> Int32[np.ndarray, "replicas 2 n"]:
    """The ids of all replicas, padded with null pages to the same length."""
    each = [pairs(moves) for moves in phase]
    n = max(ids.shape[1] for ids in each)
    return np.stack([np.pad(ids, [(0, 0), (0, n - ids.shape[1])]) for ids in each])


def _swap_out(cache: PagedAttentionCache, leaving: Int32[np.ndarray, "replicas 2 n"], host: HostPages) -> None:
    n = leaving.shape[2]
    for part in staging_slices(n):
        copies = host.store(leaving[:, 1, part], read_contents(cache, leaving[:, 0, part]))
        if part.stop < n:  # frees the staging memory before the next slice
            jax.block_until_ready(copies)


def _swap_in(
    cache: PagedAttentionCache, page_ids: Int32[np.ndarray, "replicas n"], host: HostPages, snapshots: list[HostContent]
) -> PagedAttentionCache:
    for part in staging_slices(len(snapshots)):
        cache = write_contents(cache, page_ids[:, part], host.to_devices(snapshots[part]))
        if part.stop < len(snapshots):
            jax.block_until_ready(cache)
    return cache


def _copy_all(cache: PagedAttentionCache, ids: Int32[Array, "replicas 2 n"]) -> PagedAttentionCache:
    def part(views: list[KVPages], ids: Array) -> list[KVPages]:
        return jax.tree.map(lambda array: put(array, ids[1], take(array, ids[0])), views)

    return with_pages(cache, on_devices(part, cache, ids))


_copy = jax.jit(_copy_all, donate_argnums=0)
