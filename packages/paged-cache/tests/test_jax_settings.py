"""Every call that computes works under the settings that careful projects switch on, with the same results.

All tests run with `jax_numpy_rank_promotion="raise"` and `jax_numpy_dtype_promotion="strict"` (conftest.py).
"""

import functools

import jax
import jax.numpy as jnp
import jax_settings
import numpy as np
import pytest

from paged_cache import (
    BatchShapes,
    CacheConfig,
    KVShape,
    PagedAttentionCache,
    PagedAttentionMetadata,
    PageManager,
    StepBatch,
    apply_moves,
    stack_batches,
    warm_up_moves,
)
from paged_cache.transfer import HostPages, export_sequence, import_sequence, load_prefix_cache, save_prefix_cache

pytestmark = pytest.mark.once


SETTINGS = {**jax_settings.SETTINGS, "transfer_guard": lambda: jax.transfer_guard("disallow")}
KV_HEADS, HEAD_DIM, PAGE_SIZE, NUM_PAGES = 2, 8, 4, 8
PROMPT = list(range(6))
SHAPES = BatchShapes(tokens=(8,), max_seqs=2, pages_per_seq=4)


def make_cache() -> PagedAttentionCache:
    config = CacheConfig(
        views=(KVShape(num_kv_heads=KV_HEADS, head_dim=HEAD_DIM),) * 2,
        num_pages=NUM_PAGES,
        page_size=PAGE_SIZE,
        max_sequence_length=16,
        max_seqs=2,
        dtype="int8",
    )
    return PagedAttentionCache.init_cache(None, None, config, None)


@jax.jit
def write(cache: PagedAttentionCache, k: jax.Array, v: jax.Array, step: StepBatch) -> PagedAttentionCache:
    return PagedAttentionCache(tuple(view.write(k, v, step.group(0)) for view in cache.views))


def write_step(cache: PagedAttentionCache, manager: PageManager, seqs: list[int]) -> PagedAttentionCache:
    """The cache with keys and values for the tokens that are not computed, which are committed."""
    left = manager.lengths(seqs) - manager.computed(seqs)
    step = SHAPES.pack_seqs(manager, seqs)
    data = np.random.default_rng(0).standard_normal((2, step.token_ids.size, KV_HEADS, HEAD_DIM)).astype(np.float32)
    k, v, step = jax.device_put((data[0], data[1], step))
    manager.commit(seqs, left)
    return write(cache, k, v, step)


def serve(caches: list[PagedAttentionCache], path) -> dict[str, object]:
    """A sequence is computed, forked, swapped out and in, exported and saved. The results, by name."""
    cache, *others = caches
    manager = PageManager(NUM_PAGES, PAGE_SIZE, max_seqs=2, max_sequence_length=16, num_host_pages=4)
    host = HostPages.create(cache, 4)
    cache = warm_up_moves(cache, 2, host)
    first = manager.admit(PROMPT)
    cache = write_step(cache, manager, [first])
    (twin,) = manager.fork(first)
    manager.extend([first, twin], 1, [6, 7])
    cache = apply_moves(cache, manager.take_moves(), host)
    cache = write_step(cache, manager, [first, twin])
    manager.swap_out(first)
    cache = apply_moves(cache, manager.take_moves(), host)
    manager.swap_in(first)
    cache = apply_moves(cache, manager.take_moves(), host)
    exported = export_sequence(cache, manager, first)
    save_prefix_cache(path, cache, manager)
    return {"cache": cache, "exported": exported.arrays, **restore(others, exported, path)}


def make_caches() -> list[PagedAttentionCache]:
    return [make_cache() for _ in range(3)]


def serve_fresh_caches(path) -> dict[str, object]:
    return serve(make_caches(), path)


def restore(caches, exported, path) -> dict[str, object]:
    """Two caches with the exported sequence, and with the saved prefixes."""
    managers = [PageManager(NUM_PAGES, PAGE_SIZE, max_seqs=2, max_sequence_length=16) for _ in range(2)]
    imported, _ = import_sequence(caches[0], managers[0], exported)
    return {"imported": imported, "loaded": load_prefix_cache(path, caches[1], managers[1])}


def write_with_easydels_names() -> dict[str, object]:
    """A view after a prefill and a decode, and the batches that describe them."""
    (view, _), i32 = make_cache().views, functools.partial(jnp.asarray, dtype=jnp.int32)
    step = PagedAttentionMetadata(
        prefill_length=i32(3),
        prefill_position=i32([0, 1, 2, 3]),
        prefill_page_table=i32([1, 2]),
        decodes_position=i32([5, -1]),
        decodes_page_table=i32([[3, 4], [5, 6]]),
    )
    rows = jnp.ones((4, KV_HEADS, HEAD_DIM), jnp.float32)
    view = view.write_prefill_to_cache(rows, rows, step).write_decodes_to_cache(rows[:2], rows[:2], step)
    batch = step.to_ragged_batch()
    return {"view": (view.key_pages, view.value_pages), "batch": batch, "stacked": stack_batches([batch, batch])}


plain_results = functools.cache(lambda call, *arguments: call(*arguments))
"""The results without a setting, computed once."""


assert_same = functools.partial(jax_settings.assert_same, rtol=1e-6, atol=0)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("settings") / "prefixes.safetensors"


@pytest.mark.parametrize("setting", SETTINGS)
def test_pages_from_the_first_write_to_the_last_move(setting, path):
    expected = plain_results(serve_fresh_caches, path)
    caches = make_caches()  # a number that fills an array is an implicit transfer
    with SETTINGS[setting]():
        results = serve(caches, path)
    assert_same(results, expected)


@pytest.mark.parametrize("setting", sorted(SETTINGS.keys() - {"transfer_guard"}))
def test_calls_with_easydels_names(setting):
    expected = plain_results(write_with_easydels_names)
    with SETTINGS[setting]():
        results = write_with_easydels_names()
    assert_same(results, expected)
