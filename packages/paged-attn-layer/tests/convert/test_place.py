import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from paged_attn_layer._src.convert.lazy import LazyArray
from paged_attn_layer._src.convert.operations import Stack, Transpose, apply_all
from paged_attn_layer._src.convert.place import place

MATRIX = np.arange(32, dtype=np.float32).reshape(8, 4)


def watched(array, asked):
    """The array, which notes each part that is read."""
    plain = LazyArray.of(array)

    def fill(out, index):
        asked.append(tuple((part.start, part.stop) for part in index))
        plain.fill(out, index)

    return LazyArray(array.shape, array.dtype, fill)


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        (("a", None), [((0, 4), (0, 4)), ((4, 8), (0, 4))]),
        ((None, "b"), [((0, 8), (0, 2)), ((0, 8), (2, 4))]),
        ((("a", "b"), None), [((n, n + 2), (0, 4)) for n in (0, 2, 4, 6)]),
        ((), [((0, 8), (0, 4))]),
    ],
    ids=["rows", "columns", "rows-over-both", "replicated"],
)
def test_each_part_is_read_once(spec, parts):
    """Whichever devices hold it."""
    mesh, asked = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b")), []
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    placed = place(watched(MATRIX, asked), jnp.bfloat16, sharding)
    assert asked == parts
    assert (placed.dtype, placed.sharding) == (jnp.bfloat16, sharding)
    np.testing.assert_array_equal(np.asarray(placed, np.float32), MATRIX)


def test_a_part_of_a_transposed_weight_is_read_as_rows():
    """The columns that a device needs are rows in the file."""
    mesh, asked = Mesh(np.array(jax.devices()[:2]), ("tp",)), []
    (turned,) = apply_all([Transpose()], [watched(MATRIX, asked)])
    placed = place(turned, jnp.float32, NamedSharding(mesh, PartitionSpec(None, "tp")))
    assert asked == [((0, 4), (0, 4)), ((4, 8), (0, 4))]
    np.testing.assert_array_equal(placed, MATRIX.T)


def test_a_device_reads_only_its_experts():
    mesh, asked = Mesh(np.array(jax.devices()[:2]), ("tp",)), [[] for _ in range(4)]
    (stacked,) = apply_all([Stack(4)], [watched(MATRIX + n, asked[n]) for n in range(4)])
    sharding = NamedSharding(mesh, PartitionSpec("tp"))
    assert [shard.data.shape for shard in place(stacked, jnp.float32, sharding).addressable_shards] == [(2, 8, 4)] * 2
    assert [len(each) for each in asked] == [1, 1, 1, 1]


def test_stacked_experts_are_in_memory_once():
    """8 MB of experts take 8 MB and one block, though each is turned and cast."""
    expert = LazyArray.of_rows((512, 1024), np.float64, lambda start, stop: np.ones((stop - start, 1024)))
    (stacked,) = apply_all([Transpose(), Stack(4)], [expert] * 4)
    place(stacked, jnp.float32)  # what only the first call takes
    tracemalloc.start()
    placed = place(stacked, jnp.float32)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert placed.nbytes < peak < 1.4 * placed.nbytes


def test_a_number_without_axes():
    mesh = Mesh(np.array(jax.devices()[:2]), ("tp",))
    assert place(LazyArray.of(np.float32(3)), jnp.float32, NamedSharding(mesh, PartitionSpec())) == 3
