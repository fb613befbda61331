"""Every write against a model of the cache: a dictionary from (page, slot) to the token's key and value."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from paged_cache import (
    BatchShapes,
    CacheConfig,
    KVShape,
    PagedAttentionCache,
    PagedAttentionCacheView,
    PagedAttentionMetadata,
    ScheduledSequence,
    stack_batches,
)
from paged_kernels import KVPages, RaggedBatch

HEADS, HEAD_DIM, PAGE_SIZE, NUM_PAGES = 4, 2, 4, 10
SHAPES = BatchShapes(tokens=(8, 16), max_seqs=4, pages_per_seq=3)


def mesh_of(kind=AxisType.Auto, **sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))


def view_on(mesh=None, heads=HEADS, data_axis=None, dtype="float32", **shape):
    config = CacheConfig(
        views=(KVShape(**{"num_kv_heads": heads, "head_dim": HEAD_DIM} | shape),),
        num_pages=NUM_PAGES,
        page_size=PAGE_SIZE,
        max_sequence_length=12,
        max_seqs=4,
        dtype=dtype,
    )
    return PagedAttentionCache.init_cache(mesh, None, config, None, data_axis=data_axis).views[0]


def rows(n, seed=0, heads=HEADS):
    """Keys and values of `n` tokens, no number twice and none of them zero."""
    values = 1.0 + np.arange(n * heads * HEAD_DIM, dtype=np.float32).reshape(n, heads, HEAD_DIM) + 1000 * seed
    return jnp.asarray(values), jnp.asarray(-values)


def stored(view):
    """The pages as numpy: keys and values, each `[pages, page_size, kv_heads, head_dim]`."""
    return tuple(np.moveaxis(np.asarray(side), 0, 2) for side in (view.key_pages, view.value_pages))


def expect(view, *writes):
    """The view holds exactly these `(page, slot, key, value)`, and zeros everywhere else."""
    want_k, want_v = (np.zeros_like(side) for side in stored(view))
    for page, slot, key, value in writes:
        want_k[page, slot], want_v[page, slot] = key, value
    for got, want in zip(stored(view), (want_k, want_v), strict=True):
        np.testing.assert_array_equal(got, want)


def at(pages, position, key, value):
    return pages[position // PAGE_SIZE], position % PAGE_SIZE, key, value


jit_write = jax.jit(PagedAttentionCacheView.write)
jit_prefill = jax.jit(PagedAttentionCacheView.write_prefill_to_cache)
jit_decodes = jax.jit(PagedAttentionCacheView.write_decodes_to_cache)


def i32(values):
    return jnp.asarray(values, jnp.int32)


def prefill(start, length, table=(3, 1, 2), chunk=4):
    return PagedAttentionMetadata(
        prefill_length=jnp.int32(length),
        prefill_position=start + jnp.arange(chunk, dtype=jnp.int32),
        prefill_page_table=i32(table),
    )


def decodes(positions, tables):
    return PagedAttentionMetadata(decodes_position=i32(positions), decodes_page_table=i32(tables))


def test_each_chunk_of_a_prompt_is_written_at_its_own_positions():
    pages, (k, v) = (3, 1, 2), rows(12)
    view = view_on()
    for start, length in ((0, 4), (4, 8), (8, 10)):
        view = jit_prefill(view, k[start : start + 4], v[start : start + 4], prefill(start, length))
    expect(view, *(at(pages, p, k[p], v[p]) for p in range(10)))  # rows 10 and 11 are padding


def test_a_chunk_may_start_within_a_page():
    k, v = rows(4)
    view = jit_prefill(view_on(), k, v, prefill(start=6, length=9))
    expect(view, *(at((3, 1, 2), 6 + j, k[j], v[j]) for j in range(3)))


def test_the_callers_view_is_unchanged():
    before = view_on()
    k, v = rows(4)
    after = before.write_prefill_to_cache(k, v, prefill(0, 4))
    expect(before)
    assert after is not before
    assert after.pages.data.any()
    with pytest.raises(AttributeError, match="cannot assign"):
        before.pages = after.pages


def test_mixed_metadata_writes_each_part_through_the_same_function():
    mixed = PagedAttentionMetadata(
        **{name: getattr(prefill(0, 3), name) for name in ("prefill_length", "prefill_position", "prefill_page_table")},
        decodes_position=i32([5, -1]),
        decodes_page_table=i32([[4, 5], [6, 7]]),
    )
    k, v = rows(6)
    in_parts = jit_decodes(jit_prefill(view_on(), k[:4], v[:4], mixed), k[4:], v[4:], mixed)
    at_once = jit_write(view_on(), k, v, mixed.to_ragged_batch())
    for view in (in_parts, at_once):
        expect(view, *(at((3,), p, k[p], v[p]) for p in range(3)), at((4, 5), 5, k[4], v[4]))


def test_an_idle_sequence_writes_nowhere_though_its_table_names_a_page_of_another():
    owned_by_slot_0 = 5
    k, v = rows(2)
    # -1 once wrote to `table[slot, -1]`, the last page of a sequence that has ended.
    view = view_on().write_decodes_to_cache(k, v, decodes([2, -1], [[owned_by_slot_0, 0], [0, owned_by_slot_0]]))
    expect(view, (owned_by_slot_0, 2, k[0], v[0]))


def test_the_null_page_is_never_written():
    expect(jit_decodes(view_on(), *rows(1), decodes([5], [[4, 0]])))


@pytest.mark.parametrize("shape", [(1, 4, HEADS, HEAD_DIM), (4, HEADS, HEAD_DIM)])
def test_prefill_takes_the_seeds_shapes(shape):
    k, v = rows(4)
    view = jit_prefill(view_on(), k.reshape(shape), v.reshape(shape), prefill(0, 4))
    expect(view, *(at((3,), p, k[p], v[p]) for p in range(4)))


@pytest.mark.parametrize("shape", [(2, 1, HEADS, HEAD_DIM), (2, HEADS, HEAD_DIM)])
def test_decode_takes_the_seeds_shapes(shape):
    k, v = rows(2)
    view = jit_decodes(view_on(), k.reshape(shape), v.reshape(shape), decodes([0, 6], [[4, 0], [5, 6]]))
    expect(view, (4, 0, k[0], v[0]), (6, 2, k[1], v[1]))


MESHES = {
    "one device": (mesh_of, {"tp": 1}),
    "auto": (mesh_of, {"dp": 2, "tp": 4}),
    "no tp": (mesh_of, {"x": 2}),
    "explicit": (functools.partial(mesh_of, AxisType.Explicit), {"dp": 2, "tp": 4}),
}


def check_write_on(mesh, heads, write):
    step = SHAPES.build(
        [ScheduledSequence([7, 8], 6, 3), ScheduledSequence([2], 1, 1)], num_pages=NUM_PAGES, page_size=PAGE_SIZE
    )
    k, v = rows(8, heads=heads)
    before = view_on(mesh, heads)
    after = write(before, k, v, step.batch)
    expect(after, *(at((7, 8), 3 + j, k[j], v[j]) for j in range(3)), (2, 0, k[3], v[3]))
    assert after.pages.data.sharding.is_equivalent_to(before.pages.data.sharding, 4)
    assert jax.tree.structure(after) == jax.tree.structure(before)


@pytest.mark.parametrize("heads", [HEADS, 3])  # 3 heads are replicated
@pytest.mark.parametrize("mesh", MESHES)
def test_writes_alike_on_any_mesh(mesh, heads):
    make, sizes = MESHES[mesh]
    check_write_on(make(**sizes), heads, jit_write)


def test_writes_alike_in_eager_code():
    check_write_on(mesh_of(AxisType.Explicit, tp=2), HEADS, PagedAttentionCacheView.write)


def test_works_where_the_mesh_is_set_and_the_pages_are_on_one_device():
    mesh = mesh_of(tp=4)
    view = PagedAttentionCacheView(KVPages.zeros(NUM_PAGES, PAGE_SIZE, HEADS, HEAD_DIM, "float32"), mesh, "tp")
    k, v = rows(2)
    with jax.set_mesh(mesh):
        after = view.write_decodes_to_cache(k, v, decodes([0, 6], [[4, 0], [5, 6]]))
    expect(after, (4, 0, k[0], v[0]), (6, 2, k[1], v[1]))


def test_each_replica_writes_its_own_pool():
    view = view_on(mesh_of(dp=2, tp=4), data_axis="dp")
    steps = [
        SHAPES.build([ScheduledSequence(pages, n, n)], num_pages=NUM_PAGES, page_size=PAGE_SIZE).batch
        for pages, n in (([1, 2], 5), ([1], 2))
    ]
    (k0, v0), (k1, v1) = rows(8), rows(8, seed=1)
    after = jit_write(view, jnp.stack([k0, k1]), jnp.stack([v0, v1]), stack_batches(steps))
    first = [at((1, 2), p, k0[p], v0[p]) for p in range(5)]
    second = [at((NUM_PAGES + 1,), p, k1[p], v1[p]) for p in range(2)]  # page 1 of the second group
    expect(after, *first, *second)


@pytest.mark.parametrize("mesh_sizes", [{}, {"tp": 1}, {"dp": 2, "tp": 4}])
def test_a_donated_view_is_written_in_place(mesh_sizes):
    view = view_on(mesh_of(**mesh_sizes) if mesh_sizes else None)

    def where(view):
        return [shard.data.unsafe_buffer_pointer() for shard in view.pages.data.addressable_shards]

    before, old = where(view), view.pages.data
    k, v = rows(2)
    write = jax.jit(PagedAttentionCacheView.write_decodes_to_cache, donate_argnums=0)
    after = write(view, k, v, decodes([0, 6], [[4, 0], [5, 6]]))
    assert old.is_deleted()
    assert where(after) == before


def test_warm_up_changes_nothing_on_a_live_cache():
    k, v = rows(2)
    live = jit_decodes(view_on(), k, v, decodes([0, 6], [[4, 0], [5, 6]]))
    for shape in SHAPES.all_shapes():
        live = jit_write(live, *rows(shape.tokens, seed=5), SHAPES.warm_up_batch(shape).batch)
    expect(live, (4, 0, k[0], v[0]), (6, 2, k[1], v[1]))


HALF_STEP = {"int8": 0.5 / 127, "float8_e4m3fn": 2**-4, "float8_e5m2": 2**-3, "int4": 0.5 / 7}
"""The most that a stored value is off, over the largest of its row."""


@pytest.mark.parametrize(
    ("dtype", "mesh_sizes", "heads"),
    [
        ("int8", {"dp": 2, "tp": 4}, 4),
        ("int8", {"tp": 2}, 3),
        ("float8_e4m3fn", {"tp": 2}, 4),
        ("float8_e5m2", {"tp": 2}, 4),
        ("int4", {"tp": 2}, 4),
    ],
)
def test_a_write_quantises_each_row_by_itself_and_alike_on_any_mesh(dtype, mesh_sizes, heads):
    mesh = mesh_of(**mesh_sizes)
    k, v = rows(6, heads=heads)
    k, v = k * 10.0 ** np.arange(-3, 3)[:, None, None], -k  # one scale for all would lose the small ones
    views = [view_on(where, heads, dtype=dtype) for where in (None, mesh)]
    one, split = (jit_prefill(view, k, v, prefill(0, 6, chunk=6)) for view in views)
    for position in range(6):
        for side, want in zip(stored(split), (k[position], v[position]), strict=True):
            error = np.abs(side[(3, 1, 2)[position // PAGE_SIZE], position % PAGE_SIZE] - want)
            assert (error <= HALF_STEP[dtype] * 1.0001 * np.abs(want).max(-1, keepdims=True)).all()
    for alone, shared, before in zip(*(jax.tree.leaves(view.pages) for view in (one, split, views[1])), strict=True):
        np.testing.assert_array_equal(alone, shared)
        assert shared.sharding.is_equivalent_to(before.sharding, shared.ndim)


@pytest.mark.parametrize("mesh_sizes", [{}, {"tp": 2}])
def test_a_latent_row_is_key_and_value(mesh_sizes):
    view = view_on(mesh_of(**mesh_sizes) if mesh_sizes else None, heads=1, v_head_dim=1, latent=True)
    k, v = rows(4, heads=1)
    after = jit_prefill(view, k, None, prefill(0, 4))
    np.testing.assert_array_equal(stored(after)[0][3], k)
    np.testing.assert_array_equal(stored(after)[1][3], k[..., :1])
    np.testing.assert_array_equal(jit_decodes(view, k[:1], None, decodes([0], [[4]])).key_pages[:, 4, 0], k[0])
    with pytest.raises(ValueError, match="value must be None for latent pages"):
        view.write_prefill_to_cache(k, v, prefill(0, 4))


def test_rounds_to_the_pages_dtype():
    view = PagedAttentionCacheView(KVPages.zeros(3, PAGE_SIZE, HEADS, HEAD_DIM, jnp.bfloat16))
    k, v = rows(1)
    after = jit_decodes(view, k + 0.001, v, decodes([0], [[1]]))
    np.testing.assert_array_equal(after.key_pages[:, 1, 0], (k[0] + 0.001).astype(jnp.bfloat16))


@pytest.mark.parametrize("mesh_sizes", [{}, {"tp": 4}])
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 8, 2), r"key \(4, 8, 2\) must be \[tokens, kv_heads, head_dim\] = \[tokens, 4, 2\]"),
        ((4, 4, 3), r"key \(4, 4, 3\) must be"),
        ((4, 2), r"key \(4, 2\) must have 3 axes, or 4 of which axis 0 has size 1"),
        ((2, 2, 4, 2), r"key \(2, 2, 4, 2\) must have 3 axes, or 4 of which axis 0 has size 1"),
    ],
)
def test_rows_of_the_wrong_shape_are_refused(shape, message, mesh_sizes):
    view = view_on(mesh_of(**mesh_sizes) if mesh_sizes else None)
    with pytest.raises(ValueError, match=message):
        view.write_prefill_to_cache(jnp.zeros(shape), jnp.zeros(shape), prefill(0, 4))


def test_key_and_value_must_agree():
    k, v = rows(4)
    with pytest.raises(ValueError, match=r"value \(3, 4, 2\) must be .* both of the same number of tokens"):
        view_on().write_prefill_to_cache(k, v[:3], prefill(0, 4))
    with pytest.raises(ValueError, match="value must be given too"):
        view_on().write_prefill_to_cache(k, None, prefill(0, 4))
    with pytest.raises(ValueError, match="must have the same dtype"):
        view_on().write_prefill_to_cache(k, v.astype(jnp.bfloat16), prefill(0, 4))


@pytest.mark.parametrize("write", [jit_prefill, PagedAttentionCacheView.write_prefill_to_cache])
@pytest.mark.parametrize("tokens", [3, 5])
def test_rows_must_be_as_many_as_the_step_has(tokens, write):
    k, v = rows(tokens)
    with pytest.raises(ValueError, match=rf"key has {tokens} rows, but the prefill part has 4"):
        write(view_on(), k, v, prefill(0, 4))
    with pytest.raises(ValueError, match=rf"key has {tokens} rows, but the decode part has 2"):
        view_on().write_decodes_to_cache(k, v, decodes([0, 6], [[4, 0], [5, 6]]))


@pytest.mark.parametrize("mesh_sizes", [{}, {"tp": 2}])
@pytest.mark.parametrize(
    ("table", "positions", "message"),
    [
        ([[NUM_PAGES], [1]], [0, -1], rf"page_table\[0, 0\]={NUM_PAGES} must lie in 1\.\.9"),
        ([[1], [0]], [0, 0], r"page_table\[1, 0\]=0 must lie in"),
        ([[1], [2]], [4, 0], r"kv_lens\[0\]=5 needs 2 pages of 4, but the page table has 1"),
    ],
)
def test_values_are_checked_before_anything_is_written(table, positions, message, mesh_sizes):
    view = view_on(mesh_of(**mesh_sizes) if mesh_sizes else None)
    k, v = rows(2)
    with pytest.raises(ValueError, match=message):
        view.write_decodes_to_cache(k, v, decodes(positions, table))
    expect(view)


def test_two_rows_of_one_slot_are_refused_unless_the_batch_is_only_read():
    view, (key, value) = view_on(), rows(2)
    before = stored(view)
    batch = RaggedBatch.from_lists([[3], [3]], kv_lens=[2, 2], q_lens=[1, 1])
    for call in (lambda: view.check_batch(batch, 2), lambda: view.write(key, value, batch)):
        with pytest.raises(ValueError, match="sequences 0 and 1 both write slot 1 of page 3"):
            call()
    view.check_batch(batch, 2, writes=False)
    np.testing.assert_array_equal(stored(view), before)


def test_a_data_axis_needs_stacked_arguments():
    view = view_on(mesh_of(dp=2, tp=4), data_axis="dp")
    batch = RaggedBatch.from_lists([[1]], [1], [1], max_q_len=1)
    k, v = rows(1)
    with pytest.raises(ValueError, match=r"key \(1, 4, 2\) must be \[replicas, tokens, kv_heads, head_dim\]"):
        view.write(k, v, batch)
    stacked = jnp.stack([k, k]), jnp.stack([v, v])
    with pytest.raises(ValueError, match="batch must be stacked, one for each of 2 replicas; use stack_batches"):
        view.write(*stacked, batch)
    with pytest.raises(ValueError, match=r"page_table\[0, 0\]=10 must lie in 1\.\.9"):  # ids count within a group
        view.write(*stacked, stack_batches([batch, RaggedBatch.from_lists([[10]], [1], [1], max_q_len=1)]))


def test_axes_without_a_mesh_are_refused():
    with pytest.raises(ValueError, match=r"head_axis='tp'.*but mesh is None"):
        PagedAttentionCacheView(KVPages.zeros(2, 2, 2, 2), None, "tp")


def test_a_part_that_is_absent_cannot_be_written():
    k, v = rows(4)
    with pytest.raises(ValueError, match="no decode part"):
        view_on().write_decodes_to_cache(k, v, prefill(0, 4))
    with pytest.raises(ValueError, match="no prefill part"):
        view_on().write_prefill_to_cache(k, v, decodes([0], [[1]]))
