"""Caches whose every byte is known, and what moves make of them, in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from paged_cache import CacheConfig, KVShape, PagedAttentionCache
from paged_cache._src.manager import PageMoves

NUM_PAGES, PAGE_SIZE = 12, 4
SHAPE = {"num_kv_heads": 2, "head_dim": 8}

KINDS = {
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "int8"},
    "float8": {"dtype": "float8_e4m3fn"},
    "int4": {"dtype": "int4"},
    "latent": {"dtype": "bfloat16", "num_kv_heads": 1, "v_head_dim": 4, "latent": True},
}


def mesh_of(kind=AxisType.Auto, **sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))


def filled_cache(mesh=None, data_axis=None, seed=0, views=2, num_pages=NUM_PAGES, dtype="bfloat16", **shape):
    """A cache of random numbers, some of them NaN where the type has any; null pages hold NaNs alone.

    `views` are the shapes of its views, or how many there are alike.
    """
    config = CacheConfig(
        views=views if isinstance(views, tuple) else (KVShape(**SHAPE | shape),) * views,
        num_pages=num_pages,
        page_size=PAGE_SIZE,
        max_sequence_length=32,
        max_seqs=4,
        dtype=dtype,
    )
    cache = PagedAttentionCache.init_cache(mesh, None, config, None, data_axis=data_axis)
    rng = np.random.default_rng(seed)

    def fill(array):
        numbers = rng.integers(-127, 128, array.shape).astype(array.dtype)
        if array.dtype != np.int8:
            numbers[rng.random(array.shape) < 0.1] = np.nan
            numbers[:: config.num_pages] = np.nan
        return jax.device_put(jnp.array(numbers), array.sharding)

    return jax.tree.map(fill, cache)


def stored(cache):
    """Every array's bytes, `[pages, ...]`, data and scales of each view."""
    return [np.array(array).view(np.uint8) for array in jax.tree.leaves(cache)]


def pages_of(cache, page_ids):
    """The bytes of these pages, in every array."""
    return [array[np.asarray(page_ids)] for array in stored(cache)]


def assert_same(got, want):
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)


def moves_of(**page_ids):
    nothing = {field.name: [] for field in dataclasses.fields(PageMoves)}
    return PageMoves(**{name: np.array(ids, np.int32) for name, ids in (nothing | page_ids).items()})


def moved(arrays, moves, first=0):
    """The arrays after one phase's copies and zeros, with page ids counted from `first`."""
    after = [array.copy() for array in arrays]
    for old, new in zip(arrays, after, strict=True):
        new[first + moves.copy_to] = old[first + moves.copy_from]
        new[first + moves.zero] = 0
    return after
