"""Pages are copied, read and written on TPUs where they lie: no call copies the pool."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from paged_cache import PagedAttentionCache, PagedAttentionCacheView
from paged_cache._src.transfer import apply_moves as device
from paged_cache._src.transfer import contents
from paged_kernels import KVPages

pytestmark = pytest.mark.aot

VIEWS, NUM_PAGES, N = 4, 1024, 8


def placed(shapes, sharding):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)


@pytest.mark.parametrize(("where", "dtype"), [("one chip", "bfloat16"), ("four chips", "int8")])
def test_no_call_copies_the_pool(mesh, where, dtype):
    if where == "one chip":
        pages, everywhere = [SingleDeviceSharding(mesh.devices[0])] * 2
        view = PagedAttentionCacheView(placed(KVPages.shapes(NUM_PAGES, 16, 8, 128, dtype), pages))
    else:
        pages, everywhere = NamedSharding(mesh, KVPages.partition_spec("tp")), NamedSharding(mesh, P())
        view = PagedAttentionCacheView(placed(KVPages.shapes(NUM_PAGES, 16, 8, 128, dtype), pages), mesh, "tp")
    cache = PagedAttentionCache((view,) * VIEWS)
    content = placed(KVPages.shapes(VIEWS, 16, 8, 128, dtype), pages)
    copies, page_ids = (jax.ShapeDtypeStruct(shape, jnp.int32, sharding=everywhere) for shape in ((1, 2, N), (1, N)))
    chips = 1 if where == "one chip" else mesh.size
    page = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(content)) // chips
    for call, args, kept in (
        (device._copy, (cache, copies), NUM_PAGES),
        (contents._read, (cache, page_ids), 0),
        (contents._write, (cache, page_ids, [content] * N), NUM_PAGES),
    ):
        memory = call.lower(*args).compile().memory_analysis()
        assert memory.alias_size_in_bytes == kept * page
        assert memory.temp_size_in_bytes <= 2 * N * page
