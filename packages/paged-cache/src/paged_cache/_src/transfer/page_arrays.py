"""Converts pages to named numpy arrays and back, for export and for files."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
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
"""Wraps the slices of the work, for instance with a progress bar such as `tqdm`, and yields them unchanged."""


def layout_of(cache: PagedAttentionCache) -> dict[str, Any]:
    """The sizes and the layout, as JSON values. Two caches can exchange pages only if they are equal."""
    pages = cache.views[0].pages
    sizes = {"page_size": pages.page_size, "kv_heads": pages.num_kv_heads, "views": len(cache.views)}
    return sizes | dataclasses.asdict(pages.layout)


def check_pool(cache: PagedAttentionCache, num_pages: int, replica: int) -> None:
    """Check that the cache has pages for the manager, that it has the replica, and that its layers are alike.

    Raises:
        ValueError: the cache has too few pages, has no such replica, or was donated to an earlier call.
        NotImplementedError: the layers' pages are not all of one shape.
    """
    cache.check_not_donated()
    check_alike(cache)
    view = cache.views[0]
    if not 0 <= replica < view.replicas:
        raise ValueError(f"replica={replica} must lie in 0..{view.replicas - 1}, the cache's replicas")
    pool = view.pages.num_pages // view.replicas
    if num_pages > pool:
        raise ValueError(
            f"the manager has num_pages={num_pages}, but the cache has {pool}; both must have the same number"
        )


def check_host(manager: PageManager, host: HostPages | None) -> None:
    """Check that `host` is given if moves of the manager may need it.

    Raises:
        ValueError: the manager has host pages, and `host` is `None` or has fewer.
    """
    if manager.num_host_pages and host is None:
        raise ValueError(
            f"host is None, but the manager has num_host_pages={manager.num_host_pages}, so moves that swap "
            "pages may be waiting; pass the HostPages that apply_moves is given"
        )
    if host is not None and host.num_pages < manager.num_host_pages:
        raise ValueError(
            f"host has num_pages={host.num_pages}, but the manager has num_host_pages={manager.num_host_pages}; pass "
            "the HostPages that apply_moves is given"
        )


def check_fits(cache: PagedAttentionCache, layout: Any, arrays: Mapping[str, np.ndarray], n: int) -> None:
    """Check that the layout is the cache's, and that the arrays are `n` pages of it and nothing else.

    Raises:
        ValueError: something differs; says what.
    """
    wanted = layout_of(cache)
    if not isinstance(layout, dict):
        raise ValueError(
            f"layout={layout!r} must be an object with {', '.join(wanted)}; export or save the pages again"
        )
    for name in wanted | layout:
        if (there := layout.get(name)) != (here := wanted.get(name)):
            raise ValueError(
                f"the pages have {name}={there}, but the cache has {name}={here}; use a cache with the same layout, "
                "or compute them anew"
            )
    types = _array_types(cache, n)
    if unknown := sorted(arrays.keys() - types.keys()):
        raise ValueError(f"there are arrays {', '.join(unknown)}, but the cache has only {', '.join(types)}")
    for name, (shape, dtype) in types.items():
        check_array(name, arrays.get(name), shape, dtype)


def check_array(name: str, array: np.ndarray | None, shape: tuple[int, ...], dtype: DTypeLike) -> None:
    """Check that an array is there, and that it has this shape and type.

    Raises:
        ValueError: it is missing or has another shape or type.
    """
    if array is None or (array.shape, array.dtype) != (shape, np.dtype(dtype)):
        found = "missing" if array is None else f"{array.dtype} {array.shape}"
        raise ValueError(f"array {name} is {found}, but must be {np.dtype(dtype)} {shape}")


def arrays_from_pages(
    cache: PagedAttentionCache, page_ids: Int32[np.ndarray, " n"], replica: int, progress: Progress = iter
) -> dict[str, np.ndarray]:
    """Read pages of one replica: for each view its data and its scales, `[n, kv_heads, ...]`.

    Raises:
        NotImplementedError: other processes have parts of the pages.
    """
    _check_addressable(cache)
    arrays = {name: np.empty(shape, dtype) for name, (shape, dtype) in _array_types(cache, len(page_ids)).items()}
    ids = _ids_of_replica(cache, page_ids, replica)
    for part in progress(staging_slices(len(page_ids))):
        for index, content in enumerate(jax.device_get(read_contents(cache, ids[:, part])), start=part.start):
            for name, array in _by_view(content, replica, len(cache.views)).items():
                arrays[name][index] = array
    return arrays


def pages_from_arrays(
    cache: PagedAttentionCache, page_ids: Int32[np.ndarray, " n"], arrays: dict[str, np.ndarray], replica: int
) -> PagedAttentionCache:
    """Write arrays to pages of one replica, except null pages, and return the cache. It is donated."""
    ids = _ids_of_replica(cache, page_ids, replica)
    wanted = np.flatnonzero(page_ids)
    for part in staging_slices(len(wanted)):
        contents = [_place(cache, arrays, index, replica) for index in wanted[part].tolist()]
        cache = write_contents(cache, ids[:, wanted[part]], contents)
        if part.stop < len(wanted):  # frees the staging memory before the next slice
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
    """One replica's part of a content, as named arrays."""
    return {
        _name(view, kind): array[replica * views + view]
        for kind, array in _kinds(content).items()
        for view in range(views)
    }


def _place(cache: PagedAttentionCache, arrays: dict[str, np.ndarray], index: int, replica: int) -> KVPages:
    """The content of page `index` of the arrays, on the devices of one replica; zeros on the others."""
    shape, views = content_shape(cache), len(cache.views)

    def place(kind: str, like: Array) -> Array:
        page = np.stack([arrays[_name(view, kind)][index] for view in range(views)])

        def part(where: tuple[slice, ...] | None) -> np.ndarray:
            heads = page if where is None else page[(slice(None), *where[1:])]
            return heads if replica_of(where, views) == replica else np.zeros_like(heads)

        parts = like.sharding.addressable_devices_indices_map(like.shape)
        placed = jax.device_put([part(where) for where in parts.values()], list(parts))
        return jax.make_array_from_single_device_arrays(like.shape, like.sharding, placed)

    return dataclasses.replace(shape, **{kind: place(kind, like) for kind, like in _kinds(shape).items()})


def _ids_of_replica(
    cache: PagedAttentionCache, page_ids: Int32[np.ndarray, " n"], replica: int
) -> Int32[np.ndarray, "replicas n"]:
    """The ids for one replica; null pages for the others."""
    ids = np.zeros((cache.views[0].replicas, len(page_ids)), np.int32)
    ids[replica] = page_ids
    return ids


def _check_addressable(cache: PagedAttentionCache) -> None:
    if not cache.views[0].pages.data.is_fully_addressable:
        raise NotImplementedError(
            "the pages are split over several processes, and one alone cannot turn them into arrays; export and save "
            "from a cache whose devices are all of one process"
        )
