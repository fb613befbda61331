"""Reads and writes the contents of pages, in all views of a cache at once.

A content is what one page id stores in all views: a `KVPages` of one page, with views in place of pages:

    data   [views, kv_heads, page_size, storage_lanes]
    scales [views, kv_heads, 1, scale_lanes]

It is split over a mesh as the pages are: its heads over the head axis. With a `data_axis`, the views of all replicas
follow one after another. Numbers of pages are padded to powers of two, and each function is compiled once per power.
Page ids do not matter. The padding is the null page, 0: it reads as zeros and is never written.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int32, Shaped

from paged_cache._src.cache.cache import PagedAttentionCache
from paged_cache._src.cache.sharding import sharded_call
from paged_kernels import KVPages

STAGED_PAGES = 32
"""The most contents that one call reads or writes. They are the call's device memory besides the cache."""


def read_contents(cache: PagedAttentionCache, page_ids: Int32[np.ndarray, "replicas n"]) -> list[KVPages]:
    """The contents of these pages, at most `STAGED_PAGES`; zeros for a replica whose id is the null page."""
    return _read(cache, send_ids(cache, pad_ids(page_ids)))[: page_ids.shape[1]]


def write_contents(
    cache: PagedAttentionCache, page_ids: Int32[np.ndarray, "replicas n"], contents: Sequence[KVPages]
) -> PagedAttentionCache:
    """Write contents to pages, at most `STAGED_PAGES`, and return the cache. It is donated."""
    ids = send_ids(cache, pad_ids(page_ids))
    return _write(cache, ids, [*contents, *[contents[0]] * (ids.shape[1] - len(contents))])


def compile_contents(cache: PagedAttentionCache) -> PagedAttentionCache:
    """Compile reads and writes of every size; the cache is donated and returned unchanged."""
    for size in padded_sizes(STAGED_PAGES):
        nowhere = send_ids(cache, np.zeros((cache.views[0].replicas, size), np.int32))
        cache = _write(cache, nowhere, _read(cache, nowhere))
    return cache


def content_shape(cache: PagedAttentionCache) -> KVPages:
    """The shape, dtype and sharding of a content: a `jax.ShapeDtypeStruct` for each array."""
    view = cache.views[0]

    def shape(array: Array) -> jax.ShapeDtypeStruct:
        where = array.sharding if view.mesh is None else NamedSharding(view.mesh, view.pages_spec)
        return jax.ShapeDtypeStruct((view.replicas * len(cache.views), *array.shape[1:]), array.dtype, sharding=where)

    return jax.tree.map(shape, view.pages)


def replica_of(part: tuple[slice, ...] | None, views: int) -> int:
    """The replica that this part of a content's array belongs to."""
    return 0 if part is None else (part[0].start or 0) // views


def check_alike(cache: PagedAttentionCache) -> None:
    """Check that the pages of all layers can be stacked.

    Raises:
        NotImplementedError: the layers' pages are not all of one shape.
    """
    kinds = {(view.pages.data.shape[1:], view.pages.layout, view.mesh, view.pages_spec) for view in cache.views}
    if len(kinds) > 1:
        raise NotImplementedError(
            f"the cache's layers have pages of {len(kinds)} kinds (heads, page size, row, sharding), but pages are "
            "swapped, exported and saved as one array over all layers; keep a cache for each kind"
        )


def padded_sizes(most: int) -> tuple[int, ...]:
    """The sizes that up to `most` pages are padded to: powers of two.

    >>> padded_sizes(20)
    (1, 2, 4, 8, 16, 32)
    """
    return tuple(2**power for power in range(max(most - 1, 0).bit_length() + 1))


def pad_ids(page_ids: Int32[np.ndarray, "*lead n"]) -> Int32[np.ndarray, "*lead size"]:
    """Pad ids with null pages to the next of `padded_sizes`."""
    n = page_ids.shape[-1]
    return np.pad(page_ids, [(0, 0)] * (page_ids.ndim - 1) + [(0, padded_sizes(n)[-1] - n)])


def staging_slices(n: int) -> list[slice]:
    """Slices of at most `STAGED_PAGES` that cover `n` pages."""
    return [slice(start, min(start + STAGED_PAGES, n)) for start in range(0, n, STAGED_PAGES)]


def on_devices(
    function: Callable[..., Any],
    cache: PagedAttentionCache,
    page_ids: Any,
    *contents: Any,
    out_specs: PartitionSpec | None = None,
) -> Any:
    """Call `function(views' pages, page_ids, *contents)` on each device, with its part of the pages.

    `page_ids` has a leading axis `[replicas]`; `function` gets the ids of its replica. `out_specs` says how the result
    is split. `None`: the result is the pages of each view, split as they are.
    """
    view = cache.views[0]

    def part(views: list[KVPages], page_ids: Array, *contents: Any) -> Any:
        return function(views, page_ids[0], *contents)

    views = [each.pages for each in cache.views]
    if view.mesh is None:
        return part(views, page_ids, *contents)
    of_views = [each.pages_spec for each in cache.views]
    in_specs = (of_views, view.batch_spec, *[view.pages_spec] * len(contents))
    return sharded_call(part, view.mesh, in_specs, out_specs or of_views, views, page_ids, *contents)


def send_ids(cache: PagedAttentionCache, page_ids: Int32[np.ndarray, "*lead n"]) -> Int32[Array, "*lead n"]:
    """Send page ids to the devices, each replica's ids to its own devices. A call transfers nothing else.

    Each process sends the ids of its own devices, so no process waits for another.
    """
    view = cache.views[0]
    if view.mesh is None:
        return jax.device_put(page_ids)
    where = NamedSharding(view.mesh, view.batch_spec)
    parts = where.addressable_devices_indices_map(page_ids.shape)
    arrays = jax.device_put([page_ids[part] for part in parts.values()], list(parts))
    return jax.make_array_from_single_device_arrays(page_ids.shape, where, arrays)


def with_pages(cache: PagedAttentionCache, views: Sequence[KVPages]) -> PagedAttentionCache:
    """The cache with other pages."""
    replaced = [dataclasses.replace(view, pages=pages) for view, pages in zip(cache.views, views, strict=True)]
    return dataclasses.replace(cache, views=tuple(replaced))


def take(array: Shaped[Array, " pages *page"], page_ids: Int32[Array, " n"]) -> Shaped[Array, " n *page"]:
    """Read pages of an array; zeros for the null page."""
    return array.at[_or_outside(array, page_ids)].get(mode="fill", fill_value=0)


def put(
    array: Shaped[Array, " pages *page"], page_ids: Int32[Array, " n"], pages: Shaped[Array, " n *page"]
) -> Shaped[Array, " pages *page"]:
    """Write pages to an array. Null pages in `page_ids` must come last and are not written."""
    return jax.lax.platform_dependent(array, page_ids, pages, cpu=_put_one_by_one, default=_put_at_once)


def _put_at_once(array: Array, page_ids: Array, pages: Array) -> Array:
    return array.at[_or_outside(array, page_ids)].set(pages, mode="drop")


def _put_one_by_one(array: Array, page_ids: Array, pages: Array) -> Array:
    """As `_put_at_once`, one page at a time.

    On CPUs, XLA scatters 8-bit floats (and in jax 0.10 bfloat16) as float32, which copies the whole array.
    """

    def put_one(index: Array, array: Array) -> Array:
        page = jax.lax.dynamic_index_in_dim(pages, index, keepdims=True)
        return jax.lax.dynamic_update_slice_in_dim(array, page, page_ids[index], axis=0)

    return jax.lax.fori_loop(0, jnp.count_nonzero(page_ids), put_one, array)


def _or_outside(array: Array, page_ids: Array) -> Array:
    """Replace the null page by an index outside the array: reads give zeros, writes are dropped."""
    return jnp.where(page_ids > 0, page_ids, array.shape[0])


@jax.jit
def _read(cache: PagedAttentionCache, page_ids: Int32[Array, "replicas n"]) -> list[KVPages]:
    def part(views: list[KVPages], page_ids: Array) -> list[KVPages]:
        taken = [jax.tree.map(lambda array: take(array, page_ids), pages) for pages in views]
        stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays, axis=1), *taken)  # [n, views, kv_heads, ...]
        return [jax.tree.map(lambda array, i=i: array[i], stacked) for i in range(len(page_ids))]

    return on_devices(part, cache, page_ids, out_specs=cache.views[0].pages_spec)


def _write_all(
    cache: PagedAttentionCache, page_ids: Int32[Array, "replicas n"], contents: list[KVPages]
) -> PagedAttentionCache:
    def part(views: list[KVPages], page_ids: Array, contents: list[KVPages]) -> list[KVPages]:
        def into(view: int, array: Array, *pages: Array) -> Array:
            return put(array, page_ids, jnp.stack([page[view] for page in pages]))

        return [
            jax.tree.map(lambda *arrays, view=view: into(view, *arrays), pages, *contents)
            for view, pages in enumerate(views)
        ]

    return with_pages(cache, on_devices(part, cache, page_ids, contents))


_write = jax.jit(_write_all, donate_argnums=0)
