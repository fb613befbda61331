"""Where each row of a batch goes in the pages: the one definition, for every backend."""

import jax.numpy as jnp
from jaxtyping import Array, Int32

from paged_kernels._src.batch import RaggedBatch, token_rows
from paged_kernels._src.kv_pages import KVPages


def row_slots(
    pages: KVPages, batch: RaggedBatch, tokens: int
) -> tuple[Int32[Array, " tokens"], Int32[Array, " tokens"]]:
    """The page and the slot in it of each of `tokens` rows; page 0, the null page, for a row that goes nowhere.

    Nowhere go padding and gaps, negative positions, positions past the page table, and rows whose table entry is
    the null page or no page at all.
    """
    rows = token_rows(batch, tokens)
    entry = rows.position // pages.page_size
    page_ids = batch.page_table[rows.seq, jnp.clip(entry, 0, batch.pages_per_seq - 1)]
    has_page = (rows.position >= 0) & (entry < batch.pages_per_seq) & (page_ids > 0) & (page_ids < pages.num_pages)
    return jnp.where(has_page, page_ids, 0), rows.position % pages.page_size
