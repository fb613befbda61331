"""What pages hold in all views: taken off the devices, and put into pages of the same or of another cache.

A content is a `KVPages` of one page, with an axis of views where otherwise there are pages:

    data   [views, kv_heads, page_size, storage_lanes]
    scales [views, kv_heads, 1, scale_lanes]

and is split over a mesh as the pages are: its heads over the head axis, and with a `data_axis` the groups' views come
one group after the other. Each function is compiled once for every count of pages that it is padded to, a power of two,
whatever the page ids. The padding is the null page, 0: it reads as zeros and is never written.
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
"""Contents that one call reads or writes, at most: so much memory it takes on the devices beside the cache."""


def read_contents(cache: PagedAttentionCache, page_ids: Int32[np.ndarray, "replicas n"]) -> list[KVPages]:
    """The contents of these pages, at most `STAGED_PAGES`; zeros of a group where its id is the null page."""
    return _read(cache, sent(cache, padded(page_ids)))[: page_ids.shape[1]]


def write_contents(
    cache: PagedAttentionCache, page_ids: Int32[np.ndarray, "replicas n"], contents: Sequence[KVPages]
) -> PagedAttentionCache:
    """The cache, donated, with these contents in these pages, at most `STAGED_PAGES` of them."""
    ids = sent(cache, padded(page_ids))
    return _write(cache, ids, [*contents, *[contents[0]] * (ids.shape[1] - len(contents))])


def compile_contents(cache: PagedAttentionCache) -> PagedAttentionCache:
    """The same pages, donated, once reading and writing contents is compiled for every size."""
    for size in padded_sizes(STAGED_PAGES):
        nowhere = sent(cache, np.zeros((cache.views[0].replicas, size), np.int32))
        cache = _write(cache, nowhere, _read(cache, nowhere))
    return cache


def content_shape(cache: PagedAttentionCache) -> KVPages:
    """Shape, type and sharding of a content of this cache: a `jax.ShapeDtypeStruct` for each array."""
    view = cache.views[0]

    def shape(array: Array) -> jax.ShapeDtypeStruct:
        where = array.sharding if view.mesh is None else NamedSharding(view.mesh, view.pages_spec)
        return jax.ShapeDtypeStruct((view.replicas * len(cache.views), *array.shape[1:]), array.dtype, sharding=where)

    return jax.tree.map(shape, view.pages)


def replica_of(part: tuple[slice, ...] | None, views: int) -> int:
    """The replica whose part of a content's arrays this is."""
    return 0 if part is None else (part[0].start or 0) // views


def check_alike(cache: PagedAttentionCache) -> None:
    """Refuse layers that cannot be stacked.

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
    """The counts that up to `most` pages are padded to: powers of two.

    >>> padded_sizes(20)
    (1, 2, 4, 8, 16, 32)
    """
    return tuple(2**power for power in range(max(most - 1, 0).bit_length() + 1))


def padded(page_ids: Int32[np.ndarray, "*lead n"]) -> Int32[np.ndarray, "*lead size"]:
    """The ids with null pages after them, up to the next of `padded_sizes`."""
    n = page_ids.shape[-1]
    return np.pad(page_ids, [(0, 0)] * (page_ids.ndim - 1) + [(0, padded_sizes(n)[-1] - n)])


def staging_slices(n: int) -> list[slice]:
    """`n` pages in slices of `STAGED_PAGES`; the last may be shorter."""
    return [slice(start, min(start + STAGED_PAGES, n)) for start in range(0, n, STAGED_PAGES)]


def on_devices(
    function: Callable[..., Any],
    cache: PagedAttentionCache,
    page_ids: Any,
    *contents: Any,
    out_specs: PartitionSpec | None = None,
) -> Any:
    """`function(views' pages, page_ids, *contents)` on each device's part of the pages, with the ids of its replica.

    `page_ids` has a leading axis `[replicas]`, which `function` does not see. `out_specs` says how the result is split;
    `None`: it is the pages of each view, split as they are.
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


def sent(cache: PagedAttentionCache, page_ids: Int32[np.ndarray, "*lead n"]) -> Int32[Array, "*lead n"]:
    """Page ids on the devices, of each replica on its own; nothing else of a call is transferred.

    Every process has all ids and sends those of its devices, so that none waits for another.
    """
    view = cache.views[0]
    if view.mesh is None:
        return jax.device_put(page_ids)
    where = NamedSharding(view.mesh, view.batch_spec)
    parts = where.addressable_devices_indices_map(page_ids.shape)
    sent = jax.device_put([page_ids[part] for part in parts.values()], list(parts))
    return jax.make_array_from_single_device_arrays(page_ids.shape, where, sent)


def with_pages(cache: PagedAttentionCache, views: Sequence[KVPages]) -> PagedAttentionCache:
    """The cache with these pages in place of its own."""
    replaced = [dataclasses.replace(view, pages=pages) for view, pages in zip(cache.views, views, strict=True)]
    return dataclasses.replace(cache, views=tuple(replaced))


def take(array: Shaped[Array, " pages *page"], page_ids: Int32[Array, " n"]) -> Shaped[Array, " n *page"]:
    """These pages of the array; zeros for the null page."""
    return array.at[_or_outside(array, page_ids)].get(mode="fill", fill_value=0)


def put(
    array: Shaped[Array, " pages *page"], page_ids: Int32[Array, " n"], pages: Shaped[Array, " n *page"]
) -> Shaped[Array, " pages *page"]:
    """The array with these pages in these places; what is for the null page, which must come last, is dropped."""
    return jax.lax.platform_dependent(array, page_ids, pages, cpu=_put_one_by_one, default=_put_at_once)


def _put_at_once(array: Array, page_ids: Array, pages: Array) -> Array:
    return array.at[_or_outside(array, page_ids)].set(pages, mode="drop")


def _put_one_by_one(array: Array, page_ids: Array, pages: Array) -> Array:
    """XLA scatters 8-bit floats, and in jax 0.10 bfloat16, on CPUs as float32: through a copy of the whole array."""

    def put_one(index: Array, array: Array) -> Array:
        page = jax.lax.dynamic_index_in_dim(pages, index, keepdims=True)
        return jax.lax.dynamic_update_slice_in_dim(array, page, page_ids[index], axis=0)

    return jax.lax.fori_loop(0, jnp.count_nonzero(page_ids), put_one, array)


def _or_outside(array: Array, page_ids: Array) -> Array:
    """An index outside the array, which reads as zeros and drops what is written, in place of the null page."""
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
