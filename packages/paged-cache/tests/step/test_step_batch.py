import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from paged_cache import BatchShapes, ScheduledSequence, StepBatch, StepShape, stack_batches
from paged_cache._src.step.step_batch import StepLayout
from paged_kernels import RaggedBatch, pack_tree_masks

SHAPES = BatchShapes(tokens=(8, 16), max_seqs=4, pages_per_seq=3, groups=2)


def pack(q_lens, shape=None, first_page=1):
    """Sequences of these rows on pages of their own, a page for each group."""
    n = len(q_lens)
    tables = np.zeros((2, n, 3), np.int32)
    tables[:, :, 0] = np.arange(first_page, first_page + 2 * n).reshape(2, n)
    q_lens = np.array(q_lens, np.int32)
    ids = np.arange(100, 100 + q_lens.sum(), dtype=np.int32)
    return SHAPES.pack(tables, q_lens + 3, q_lens, ids, num_pages=40, page_size=16, shape=shape)


def arrays(step):
    """All that a model reads of a step."""
    return step.token_ids, step.positions, step.last_rows, step.group(0), step.group(1)


def build(*sequences):
    shapes = dataclasses.replace(SHAPES, groups=1)
    return shapes.build([ScheduledSequence(*each) for each in sequences], num_pages=12, page_size=4).batch


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_the_arrays_fill_the_buffer_without_a_gap():
    layout = StepLayout(StepShape(8, 8), max_seqs=4, pages_per_seq=3, groups=2, cross_groups=(1,))
    ends = [part.stop for part in layout.slices.values()]
    assert [part.start for part in layout.slices.values()] == [0, *ends[:-1]]
    assert layout.size == ends[-1] == 1 + 4 + 5 + 4 + 4 + 8 + 8 + 2 * 4 * 3


def test_a_step_is_one_leaf_and_the_same_inside_jit():
    step = pack([3, 1])
    assert [leaf.dtype for leaf in jax.tree.leaves(step)] == ["int32"]
    assert_same(jax.jit(arrays)(step), arrays(step))
    assert_same(arrays(jax.device_put(step)), arrays(step))


def test_a_step_is_sent_in_one_transfer_of_one_array(monkeypatch):
    run = jax.jit(lambda step: sum(leaf.sum() for leaf in jax.tree.leaves(arrays(step))))
    run(jax.device_put(pack([3, 1])))  # compiled
    sent, device_put = [], jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda tree: sent.extend(jax.tree.leaves(tree)) or device_put(tree))
    with jax.transfer_guard_host_to_device("disallow"):  # refuses transfers but those of device_put
        result = run(jax.device_put(pack([2, 2])))
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            run(pack([2, 2]))
    assert int(result) > 0
    assert [(type(leaf), leaf.shape) for leaf in sent] == [
        (np.ndarray, (SHAPES.warm_up_batch(StepShape(8, 8)).layout.size,))
    ]


def test_a_jitted_step_compiles_once_a_listed_shape():
    run = jax.jit(lambda step: jax.tree.map(jnp.sum, arrays(step)))
    for shape in SHAPES.all_shapes():
        run(jax.device_put(SHAPES.warm_up_batch(shape)))
    for q_lens in ((1,), (1, 1, 1, 1), (2,), (8,), (5, 4), (13, 1, 1, 1), ()):
        run(jax.device_put(pack(q_lens)))
    assert run._cache_size() == len(SHAPES.all_shapes()) == 3


def test_cutting_up_the_buffer_costs_slices_and_at_most_one_copy_of_it():
    step = BatchShapes(tokens=(64,), max_seqs=64, pages_per_seq=64, groups=2).warm_up_batch(StepShape(64, 1))
    cut = jax.make_jaxpr(arrays)(step)
    assert {str(equation.primitive) for equation in cut.eqns} <= {"slice", "reshape", "squeeze"}
    memory = jax.jit(lambda step: jax.tree.map(jnp.sum, arrays(step))).lower(step).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1.1 * step.buffer.nbytes


def test_stacked_batches_have_a_leading_axis():
    first, second = build(([1], 3, 2)), build(([2, 3], 5, 4))
    stacked = stack_batches([first, second])
    assert stacked.kv_lens.tolist() == [[3, 0, 0, 0], [5, 0, 0, 0]]
    assert stacked.num_seqs.tolist() == [1, 1]
    assert stacked.max_q_len == 8


def test_only_batches_of_one_shape_stack():
    with pytest.raises(ValueError, match="batches is empty"):
        stack_batches([])
    chunk, decode = build(([1], 3, 2)), build(([1], 3, 1))
    with pytest.raises(ValueError, match="must agree in max_q_len, in which arrays they have and in their shapes"):
        stack_batches([chunk, decode])
    in_a_tree = dataclasses.replace(chunk, tree_mask=pack_tree_masks([None], [2], tokens=8))
    with pytest.raises(ValueError, match=r"must agree .* \('\.tree_mask', \(8, 1\)\)"):
        stack_batches([chunk, in_a_tree])
    assert stack_batches([in_a_tree, in_a_tree]).tree_mask.shape == (2, 8, 1)
    with pytest.raises(ValueError, match=r"must agree .*StepLayout\(shape=StepShape\(tokens=4, max_q_len=1\)"):
        stack_batches([pack([3]), pack([1])])


def test_the_steps_of_all_replicas_stack_on_the_host_and_are_sent_at_once():
    mesh = jax.make_mesh((2,), ("dp",), devices=jax.devices()[:2])
    shape = SHAPES.shape_for(np.array([3, 1]), np.array([1]))
    steps = [pack([3, 1], shape), pack([1], shape, first_page=9)]
    stacked = stack_batches(steps)
    assert isinstance(stacked.buffer, np.ndarray)
    placed = jax.device_put(stacked, NamedSharding(mesh, PartitionSpec("dp")))
    assert [part.data.shape[0] for part in placed.buffer.addressable_shards] == [1, 1]
    want = jax.tree.map(lambda *leaves: np.stack(leaves), *(arrays(step) for step in steps))
    assert_same(arrays(stacked), want)
    assert_same(jax.jit(arrays)(placed), want)


def test_batches_on_devices_stack_there():
    on_device = jax.device_put([pack([1]), pack([1])])
    assert isinstance(stack_batches(on_device).buffer, jax.Array)
    assert isinstance(stack_batches([RaggedBatch.from_lists([[1]], [1], [1])] * 2).kv_lens, jax.Array)


def test_a_step_is_a_pytree_of_anything():
    step = jax.tree.map(lambda leaf: None, pack([1]))
    assert isinstance(step, StepBatch)
