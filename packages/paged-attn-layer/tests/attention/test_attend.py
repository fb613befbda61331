import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import TOLERANCE, Step
from eformer.escale import PartitionAxis, PartitionManager
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from numpy.testing import assert_allclose, assert_array_equal

from paged_attn_layer import AttentionMetadata, PagedAttn, attend, prepare
from paged_attn_layer._src.engine.compilations import count_compilations
from paged_cache import PagedAttentionCacheView, PagedAttentionMetadata, stack_batches
from paged_kernels import AttentionSpec, KVPages, merge_attention_states, paged_attention

TOKENS = 16
STEP = Step(kv_lens=(5, 20, 9), q_lens=(5, 1, 7), q_heads=16, kv_heads=8)
THREE = Step(kv_lens=(5, 20, 9), q_lens=(5, 1, 7), q_heads=6, kv_heads=3)
OLDER = pytest.mark.filterwarnings("ignore:.*context manager has been deprecated:DeprecationWarning")

forward = jax.jit(
    lambda impl, *args, **options: impl(*args, **options), static_argnums=0, static_argnames=("return_lse",)
)


def run_eagerly(impl, *args, **options):
    return impl(*args, **options)


def mesh_of(count, name="tp"):
    return Mesh(np.array(jax.devices()[:count]), (name,))


def pages_of(step, dtype=None, *, with_new=False):
    pages = step.pages(with_new=with_new)
    return KVPages.from_kv(pages.k, pages.v, dtype)


def view_on(step, mesh, head_axis="tp", dtype=None):
    pages = jax.device_put(pages_of(step, dtype), NamedSharding(mesh, KVPages.partition_spec(head_axis)))
    return PagedAttentionCacheView(pages, mesh=mesh, head_axis=head_axis)


def part_of(array):
    """The shape of what one device has of it."""
    return array.sharding.shard_shape(array.shape)


def check(output, step):
    assert_allclose(output.attention_outputs, step.expected(TOKENS), **TOLERANCE)
    assert_array_equal(output.cache_view.pages.data, step.pages(with_new=True).data)


@pytest.mark.parametrize(
    ("count", "run"),
    [(1, forward), (8, forward), (8, run_eagerly)],
    ids=["1", "8", "8-eager"],
)
def test_heads_split_over_any_number_of_devices_give_the_same(count, run):
    view = view_on(STEP, mesh_of(count))
    output = run(PagedAttn(), *STEP.rows(TOKENS), view, STEP.batch)
    check(output, STEP)
    assert part_of(output.attention_outputs)[1] == STEP.q_heads // count
    assert part_of(output.cache_view.pages.data)[1] == STEP.kv_heads // count


def test_kv_heads_that_do_not_divide_are_replicated():
    check(forward(PagedAttn(), *THREE.rows(TOKENS), view_on(THREE, mesh_of(2), None), THREE.batch), THREE)
    given = PagedAttn(AttentionMetadata(mesh=mesh_of(2)))  # whose axis "tp" does not divide 3
    check(forward(given, *THREE.rows(TOKENS), THREE.view(), THREE.batch), THREE)


@pytest.mark.parametrize(
    ("step", "counts", "run"), [(STEP, (2, 4), forward), (THREE, (4,), run_eagerly)], ids=["split", "replicated-eager"]
)
def test_sinks_slopes_tree_masks_and_scales_are_split_with_the_heads(step, counts, run):
    batch, heads, (q, k, v) = step.in_a_tree(TOKENS), step.heads(), step.rows(TOKENS)
    new = pages_of(step, "int8", with_new=True)
    reference = paged_attention(q, new, batch, AttentionSpec(), heads, backend="reference", return_lse=True)
    head_axis = "tp" if step is STEP else None
    views = [view_on(step, mesh_of(count), head_axis, "int8") for count in counts]
    for view in (PagedAttentionCacheView(pages_of(step, "int8")), *views):
        output = run(PagedAttn(), q, k, v, view, batch, head_params=heads, return_lse=True)
        assert_allclose(output.attention_outputs, reference[0], **TOLERANCE)
        assert_allclose(output.lse, reference[1], **TOLERANCE)
        assert_array_equal(output.cache_view.pages.k, new.k)
        assert_array_equal(output.cache_view.pages.v, new.v)


def test_parts_of_a_context_merge_to_the_whole():
    """Each sequence's first page, and the rest; some have no rest."""
    whole, size, mesh = STEP.batch, STEP.page_size, mesh_of(2)
    pages = jax.device_put(STEP.pages(with_new=True), NamedSharding(mesh, KVPages.partition_spec("tp")))
    first = dataclasses.replace(whole, kv_lens=jnp.minimum(whole.kv_lens, size), q_starts=whole.first_positions)
    rest = dataclasses.replace(
        whole,
        page_table=jnp.roll(whole.page_table, -1, axis=1),
        kv_lens=jnp.maximum(whole.kv_lens - size, 0),
        q_starts=whole.first_positions - size,
    )
    view = PagedAttentionCacheView(pages, mesh=mesh, head_axis="tp")
    q = STEP.rows(TOKENS)[0]
    parts = [forward(PagedAttn(), q, None, None, view, batch, return_lse=True) for batch in (first, rest)]
    out, _ = merge_attention_states(
        jnp.stack([part.attention_outputs for part in parts]), jnp.stack([part.lse for part in parts])
    )
    assert_allclose(out, STEP.expected(TOKENS), **TOLERANCE)


@pytest.mark.parametrize("count", [None, 2])
def test_a_prepared_batch_is_made_once_and_serves_every_layer(count):
    """And eager code compiles nothing when it prepares the next step of the same shape."""
    view = STEP.view() if count is None else view_on(STEP, mesh_of(count))
    q, k, v = STEP.rows(TOKENS)
    sizes = {"tokens": TOKENS, "q_heads": STEP.q_heads, "q_dtype": q.dtype}
    prepared = prepare(STEP.batch, view, **sizes)
    attended = attend(q, k, v, view, prepared)
    assert_allclose(attended.out, STEP.expected(TOKENS), **TOLERANCE)
    again = attend(q, None, None, attended.view, prepared)  # a layer that reads another layer's keys and values
    assert_allclose(again.out, STEP.expected(TOKENS), **TOLERANCE)
    assert attended.lse is None
    with count_compilations() as compilations:
        prepare(STEP.batch, view, **sizes)
    assert compilations.total == 0


ONE = dataclasses.replace(STEP, q_heads=6, kv_heads=1)
"""A step whose query heads all share one KV head."""


@pytest.mark.parametrize(("step", "count"), [(STEP, 2), (ONE, 2), (ONE, 3)], ids=["heads", "one-2", "one-3"])
def test_a_batch_prepared_on_a_mesh_knows_each_devices_heads(step, count):
    view, heads = view_on(step, mesh_of(count), "tp" if step.kv_heads > 1 else None), step.heads()
    q, k, v = step.rows(TOKENS)
    sizes = {"tokens": TOKENS, "q_heads": step.q_heads, "q_dtype": q.dtype}
    prepared = prepare(step.batch, view, **sizes, head_params=heads)
    attended = attend(q, k, v, view, prepared, head_params=heads)
    options = {"sinks": heads.sinks, "alibi_slopes": heads.alibi_slopes}
    assert_allclose(attended.out, step.expected(TOKENS, **options), **TOLERANCE)
    assert part_of(attended.out)[1] == step.q_heads // count


def test_heads_of_one_kv_head_are_whole_where_the_mesh_does_not_divide_them():
    output = forward(PagedAttn(), *ONE.rows(TOKENS), view_on(ONE, mesh_of(4), None), ONE.batch)
    check(output, ONE)
    assert part_of(output.attention_outputs)[1] == ONE.q_heads


def test_parameters_of_too_few_heads_are_refused_where_heads_are_whole():
    with pytest.raises(ValueError, match=r"head_params.sinks \(6,\) must be \(16,\): one for each head of q"):
        PagedAttn()(*STEP.rows(TOKENS), view_on(STEP, mesh_of(2)), STEP.batch, head_params=THREE.heads())


CONTEXTS = {"none": lambda mesh: contextlib.nullcontext(), "set_mesh": jax.set_mesh, "with": lambda mesh: mesh}


@OLDER
@pytest.mark.parametrize(
    ("context", "axis_type", "run"),
    [
        ("set_mesh", AxisType.Auto, forward),
        ("set_mesh", AxisType.Explicit, forward),
        ("set_mesh", AxisType.Explicit, run_eagerly),
        ("with", AxisType.Auto, run_eagerly),
        ("with", AxisType.Explicit, forward),
    ],
    ids=[
        "set_mesh-auto-jit",
        "set_mesh-explicit-jit",
        "set_mesh-explicit-eager",
        "with-auto-eager",
        "with-explicit-jit",
    ],
)
def test_pages_of_one_device_work_on_the_context_s_mesh(context, run, axis_type):
    mesh = jax.make_mesh((4,), ("tp",), axis_types=(axis_type,))
    q, k, v = STEP.rows(TOKENS)
    with CONTEXTS[context](mesh):
        output = run(PagedAttn(), q, k, v, STEP.view(), STEP.batch)
    check(output, STEP)
    assert part_of(output.attention_outputs)[1] == STEP.q_heads // 4
    assert output.cache_view.mesh is None  # the tree structure that came in


@OLDER
@pytest.mark.parametrize(
    ("context", "run"),
    [("none", run_eagerly), ("set_mesh", forward), ("set_mesh", run_eagerly), ("with", forward)],
    ids=["none-eager", "set_mesh-jit", "set_mesh-eager", "with-jit"],
)
def test_prefill_and_decode_take_the_mesh_by_the_same_rule(context, run):
    mesh, view = mesh_of(2), view_on(STEP, mesh_of(2))
    with CONTEXTS[context](mesh):
        check(run(PagedAttn(), *STEP.rows(TOKENS), view, STEP.batch), STEP)
        decode = dataclasses.replace(STEP, kv_lens=(9, 17), q_lens=(1, 1))
        batch = dataclasses.replace(decode.batch, max_q_len=1)
        output = run(PagedAttn(), *decode.rows(), view_on(decode, mesh), batch)
    assert_allclose(output.attention_outputs, decode.expected(), **TOLERANCE)


def test_arrays_committed_to_one_device_work_eagerly_on_a_mesh():
    q, k, v, view = jax.device_put((*STEP.rows(TOKENS), STEP.view()), jax.devices()[1])
    check(PagedAttn()(q, k, v, view, STEP.batch, mesh=mesh_of(4)), STEP)


def test_the_mesh_of_the_metadata_is_used():
    q, k, v = STEP.rows(TOKENS)
    output = forward(PagedAttn(AttentionMetadata(mesh=mesh_of(8))), q, k, v, STEP.view(), STEP.batch)
    check(output, STEP)
    assert len(output.attention_outputs.sharding.device_set) == 8


def test_the_partition_manager_names_the_axis():
    manager = PartitionManager(PartitionAxis(tensor_parallel_axis="model"))
    impl = PagedAttn(AttentionMetadata(mesh=mesh_of(4, "model"), partition_manager=manager))
    output = impl(*STEP.rows(TOKENS), STEP.view(), STEP.batch)
    check(output, STEP)
    assert part_of(output.attention_outputs)[1] == STEP.q_heads // 4


def test_inside_the_caller_s_own_shard_map_it_computes_the_part_it_is_given():
    mesh, heads, everywhere = mesh_of(4), PartitionSpec(None, "tp"), PartitionSpec()

    def part(q, k, v, pages, batch):
        output = PagedAttn()(q, k, v, PagedAttentionCacheView(pages), batch)
        return output.attention_outputs

    run = jax.shard_map(
        part, mesh=mesh, in_specs=(heads, heads, heads, heads, everywhere), out_specs=heads, check_vma=False
    )
    out = jax.jit(run)(*STEP.rows(TOKENS), STEP.pages(with_new=False), STEP.batch)
    assert_allclose(out, STEP.expected(TOKENS), **TOLERANCE)


def test_bad_values_are_refused_in_eager_calls_on_a_mesh_too():
    batch = dataclasses.replace(STEP.batch, page_table=STEP.batch.page_table.at[1, 0].set(99))
    with pytest.raises(ValueError, match=r"page_table\[1, 0\]=99 must lie in 1..23"):
        PagedAttn()(STEP.rows(TOKENS)[0], None, None, view_on(STEP, mesh_of(2)), batch)


class TestDataParallel:
    """Two replicas, each with its own sequences and pages, over `dp`; heads over `tp`."""

    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("dp", "tp"))
    steps = (STEP, dataclasses.replace(STEP, kv_lens=(17, 1, 12), q_lens=(1, 1, 12), seed=1))

    @pytest.fixture
    def view(self):
        parts = [step.pages(with_new=False) for step in self.steps]
        pages = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
        pages = jax.device_put(pages, NamedSharding(self.mesh, KVPages.partition_spec("tp", "dp")))
        return PagedAttentionCacheView(pages, mesh=self.mesh, head_axis="tp", data_axis="dp")

    @pytest.fixture
    def batch(self):
        return stack_batches([step.batch for step in self.steps])

    @pytest.fixture
    def rows(self):
        return [jnp.stack(group) for group in zip(*(step.rows(TOKENS) for step in self.steps), strict=True)]

    def test_each_replica_attends_its_own_pages(self, view, batch, rows):
        output = forward(PagedAttn(), *rows, view, batch)
        assert_allclose(output.attention_outputs, jnp.stack([s.expected(TOKENS) for s in self.steps]), **TOLERANCE)
        self.check_pages_and_split(output)

    def test_each_replica_has_trees_of_its_own_and_all_have_the_same_heads(self, view, rows):
        trees = [step.in_a_tree(TOKENS) for step in self.steps]
        trees = [dataclasses.replace(tree, max_q_len=TOKENS) for tree in trees]  # one shape
        output = run_eagerly(PagedAttn(), *rows, view, stack_batches(trees), head_params=STEP.heads())
        for group, (step, tree) in enumerate(zip(self.steps, trees, strict=True)):
            pages, q = step.pages(with_new=True), rows[0][group]
            expected = paged_attention(q, pages, tree, AttentionSpec(), STEP.heads(), backend="reference")
            assert_allclose(output.attention_outputs[group], expected, **TOLERANCE)
        self.check_pages_and_split(output)

    def check_pages_and_split(self, output):
        new = jnp.concatenate([step.pages(with_new=True).data for step in self.steps])
        assert_array_equal(output.cache_view.pages.data, new)
        assert part_of(output.attention_outputs)[:3] == (1, TOKENS, STEP.q_heads // 2)

    def test_a_batch_that_is_not_stacked_is_refused(self, view, rows):
        with pytest.raises(ValueError, match=r"must be \[2, seqs, pages_per_seq\] for a cache with data_axis='dp'"):
            PagedAttn()(*rows, view, STEP.batch)

    def test_a_stacked_batch_needs_a_cache_split_so(self, batch, rows):
        with pytest.raises(ValueError, match=r"must be \[seqs, pages_per_seq\] for a cache with data_axis=None"):
            PagedAttn()(*rows, STEP.view(), batch)

    def test_metadata_of_one_replica_is_refused(self, view, rows):
        metadata = PagedAttentionMetadata(
            decodes_position=jnp.zeros(2, jnp.int32), decodes_page_table=jnp.ones((2, 2), jnp.int32)
        )
        with pytest.raises(ValueError, match="split over data_axis='dp'; give a stacked RaggedBatch"):
            PagedAttn()(*rows, view, metadata)


@pytest.mark.parametrize("count", [1, 2])
def test_pages_that_were_donated_are_refused_by_name(count):
    view = view_on(STEP, mesh_of(count))
    jax.tree.map(lambda array: array.delete(), view.pages)
    rows = [jnp.ones((TOKENS, heads, view.pages.head_dim), jnp.float32) for heads in (16, 8, 8)]
    with pytest.raises(ValueError, match=r"view\.pages\.data is deleted: it was donated to an earlier call"):
        attend(*rows, view, STEP.batch)
