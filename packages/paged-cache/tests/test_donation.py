"""A cache that was donated to an earlier call is refused by every call that takes a cache or a view."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filled_cache import NUM_PAGES, PAGE_SIZE, filled_cache, mesh_of, moves_of, pages_of

from paged_cache import PagedAttentionMetadata, PageManager, apply_moves, apply_moves_by_replica, warm_up_moves
from paged_cache.transfer import export_sequence, import_sequence, load_prefix_cache, save_prefix_cache
from paged_kernels import RaggedBatch

MOVES = moves_of(zero=[1])
ROWS = jnp.ones((1, 2, 8), jnp.float32)
STEP = PagedAttentionMetadata(decodes_position=jnp.zeros(1, jnp.int32), decodes_page_table=jnp.array([[3]], jnp.int32))


def manager():
    return PageManager(NUM_PAGES, PAGE_SIZE, max_seqs=2, max_sequence_length=32)


@pytest.fixture(scope="module")
def exported():
    one, cache = manager(), filled_cache()
    one.commit(one.admit([1, 2]), 2)
    one.take_moves()
    return export_sequence(cache, one, 0)


CALLS = {
    "apply_moves": lambda cache, _: apply_moves(cache, [MOVES]),
    "apply_moves_by_replica": lambda cache, _: apply_moves_by_replica(cache, [[MOVES]]),
    "warm_up_moves": lambda cache, _: warm_up_moves(cache, 1),
    "export_sequence": lambda cache, _: export_sequence(cache, manager(), 0),
    "import_sequence": lambda cache, pages: import_sequence(cache, manager(), pages),
    "save_prefix_cache": lambda cache, _: save_prefix_cache("unused", cache, manager()),
    "load_prefix_cache": lambda cache, _: load_prefix_cache("unused", cache, manager()),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_donated_cache_is_refused(call, exported):
    cache = filled_cache()
    apply_moves(cache, [MOVES])
    with pytest.raises(ValueError, match=r"cache\.views\[0\]\.pages\.data is deleted: it was donated to an earlier"):
        CALLS[call](cache, exported)


@pytest.mark.parametrize("mesh", [None, {"tp": 2}])
def test_a_donated_view_is_not_written(mesh):
    (view,) = filled_cache(mesh and mesh_of(**mesh), views=1).views
    batch = RaggedBatch.from_lists([[3]], [1], [1])
    write = jax.jit(lambda view: view.write(ROWS, ROWS, batch), donate_argnums=0)
    after = write(view)
    for call in (lambda: view.write(ROWS, ROWS, batch), lambda: view.write_decodes_to_cache(ROWS, ROWS, STEP)):
        with pytest.raises(ValueError, match=r"view\.pages\.data is deleted: it was donated to an earlier call"):
            call()
    again = after.write(ROWS, ROWS, batch)
    np.testing.assert_array_equal(pages_of(again, [3]), pages_of(after, [3]))
