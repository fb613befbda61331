"""Pages as numpy arrays, by the names under which they are exported and saved."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int32

from paged_cache._src.cache.cache import PagedAttentionCache
from paged_cache._src.manager import PageManager
from paged_cache._src.transfer.contents import (
    check_alike,
    content_shape,
    read_contents,
    replica_of,
    staging_slices,
    write_contents,
)
from paged_cache._src.transfer.host_pages import HostPages
from paged_kernels import KVPages

Progress = Callable[[list[slice]], Iterable[slice]]
"""What a bar may be put around: it passes the parts of the work on, one after the other."""


def layout_of(cache: PagedAttentionCache) -> dict[str, Any]:
    """What two caches must have in common for one's pages to be of use in the other, as JSON can say it."""
    pages = cache.views[0].pages
    sizes = {"page_size": pages.page_size, "kv_heads": pages.num_kv_heads, "views": len(cache.views)}
    return sizes | dataclasses.asdict(pages.layout)


def check_pool(cache: PagedAttentionCache, num_pages: int, replica: int) -> None:
    """Refuse a manager of more pages than the cache has, a replica that it has not, and layers that differ.

    Raises:
        ValueError: says which of the first two.
        NotImplementedError: the layers' pages are not all of one shape.
    """
    check_alike(cache)
    view = cache.views[0]
    if not 0 <= replica < view.replicas:
        raise ValueError(f"replica={replica} must lie in 0..{view.replicas - 1}, the cache's replicas")
    pool = view.pages.num_pages // view.replicas
    if num_pages > pool:
        raise ValueError(f"the manager has num_pages={num_pages}, but the cache has {pool}; both must have as many")


def check_host(manager: PageManager, host: HostPages | None) -> None:
    """Refuse to go without host pages where moves that need them may be waiting, before anything is taken.

    Raises:
        ValueError: the manager has host pages, and `host` is `None`.
    """
    if manager.num_host_pages and host is None:
        raise ValueError(
            f"host is None, but the manager has num_host_pages={manager.num_host_pages}, so that moves which swap "
            "pages may be waiting; pass the HostPages that apply_moves is given"
        )


def check_fits(cache: PagedAttentionCache, layout: dict[str, Any], arrays: dict[str, np.ndarray], n: int) -> None:
    """Refuse pages of another layout, and arrays that are not `n` pages of this cache.

    Raises:
        ValueError: names what differs.
    """
    for name, here in layout_of(cache).items():
        if layout.get(name) != here:
            raise ValueError(
                f"the pages have {name}={layout.get(name)}, but the cache has {name}={here}; use a cache like the one "
                "that they are from, or compute them anew"
            )
    for name, (shape, dtype) in _array_types(cache, n).items():
        if name not in arrays or (arrays[name].shape, arrays[name].dtype) != (shape, dtype):
            found = f"{arrays[name].dtype} {arrays[name].shape}" if name in arrays else "missing"
            raise ValueError(f"array {name} is {found}, but must be {dtype} {shape}")


def arrays_from_pages(
    cache: PagedAttentionCache, page_ids: Int32[np.ndarray, " n"], replica: int, progress: Progress = iter
) -> dict[str, np.ndarray]:
    """What these pages of one replica hold: for each view `[n, kv_heads, ...]`, its data and its scales.

    Raises:
        NotImplementedError: other processes have parts of the pages.
    """
    _check_addressable(cache)
    arrays = {name: np.empty(shape, dtype) for name, (shape, dtype) in _array_types(cache, len(page_ids)).items()}
    ids = _of_group(cache, page_ids, replica)
    for chunk in progress(staging_slices(len(page_ids))):
        for index, content in enumerate(jax.device_get(read_contents(cache, ids[:, chunk])), start=chunk.start):
            for name, array in _by_view(content, replica, len(cache.views)).items():
                arrays[name][index] = array
    return arrays


def pages_from_arrays(
    cache: PagedAttentionCache, page_ids: Int32[np.ndarray, " n"], arrays: dict[str, np.ndarray], replica: int
) -> PagedAttentionCache:
    """The cache, donated, with the arrays' pages in these pages of one replica, but for the null page."""
    ids = _of_group(cache, page_ids, replica)
    wanted = np.flatnonzero(page_ids)
    for chunk in staging_slices(len(wanted)):
        contents = [_place(cache, arrays, index, replica) for index in wanted[chunk].tolist()]
        cache = write_contents(cache, ids[:, wanted[chunk]], contents)
        if chunk.stop < len(wanted):  # else the next contents would need memory beside these
            jax.block_until_ready(cache)
    return cache


def _array_types(cache: PagedAttentionCache, n: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    return {
        _name(view, kind): ((n, *array.shape[1:]), array.dtype)
        for view, each in enumerate(cache.views)
        for kind, array in _kinds(each.pages).items()
    }


def _name(view: int, kind: str) -> str:
    return f"view.{view}.{kind}"


def _kinds(pages: KVPages) -> dict[str, Any]:
    return {"data": pages.data} if pages.scales is None else {"data": pages.data, "scales": pages.scales}


def _by_view(content: KVPages, replica: int, views: int) -> dict[str, np.ndarray]:
    """A group's part of a content, as arrays."""
    return {
        _name(view, kind): array[replica * views + view]
        for kind, array in _kinds(content).items()
        for view in range(views)
    }


def _place(cache: PagedAttentionCache, arrays: dict[str, np.ndarray], index: int, replica: int) -> KVPages:
    """The content of one of the arrays' pages on the devices of a replica, and zeros on the others."""
    shape, views = content_shape(cache), len(cache.views)

    def place(kind: str, like: Array) -> Array:
        page = np.stack([arrays[_name(view, kind)][index] for view in range(views)])

        def part(where: tuple[slice, ...] | None) -> np.ndarray:
            heads = page if where is None else page[(slice(None), *where[1:])]
            return heads if replica_of(where, views) == replica else np.zeros_like(heads)

        return jax.make_array_from_callback(like.shape, like.sharding, part)

    return dataclasses.replace(shape, **{kind: place(kind, like) for kind, like in _kinds(shape).items()})


def _of_group(
    cache: PagedAttentionCache, page_ids: Int32[np.ndarray, " n"], replica: int
) -> Int32[np.ndarray, "replicas n"]:
    """The ids for one replica, and null pages for the others."""
    ids = np.zeros((cache.views[0].replicas, len(page_ids)), np.int32)
    ids[replica] = page_ids
    return ids


def _check_addressable(cache: PagedAttentionCache) -> None:
    if not cache.views[0].pages.data.is_fully_addressable:
        raise NotImplementedError(
            "the pages are split over several processes, and one alone cannot turn them into arrays; export and save "
            "from a cache whose devices are all of one process"
        )
