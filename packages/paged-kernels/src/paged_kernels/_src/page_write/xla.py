"""The page write as one scatter: the definition, and the implementation where there is no kernel."""

from jaxtyping import Array, Float

from paged_kernels._src.batch import RaggedBatch
from paged_kernels._src.kv_pages import KVPages
from paged_kernels._src.page_write.slots import row_slots


def write_kv_xla(
    pages: KVPages,
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads v_head_dim"] | None,
    batch: RaggedBatch,
) -> KVPages:
    """Pages with each row in its slot; rows that go nowhere are dropped."""
    page_ids, slots = row_slots(pages, batch, k.shape[0])
    return pages.put_entries(page_ids, slots, k, v)
