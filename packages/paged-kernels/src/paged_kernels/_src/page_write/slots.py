"""Where each row of a batch is stored. Every backend uses this one definition."""

import jax.numpy as jnp
from jaxtyping import Array, Int32

from paged_kernels._src.batch import RaggedBatch, token_rows
from paged_kernels._src.kv_pages import KVPages

RowSlots = tuple[Int32[Array, " tokens"], Int32[Array, " tokens"]]


def row_slots(pages: KVPages, batch: RaggedBatch, tokens: int) -> RowSlots:
    """Returns the page of each of `tokens` rows, and the slot in that page.

    The page is 0, the null page, for rows that are not stored: padding, gaps, positions that are negative or past the
    page table, and rows whose page id is 0 or not a page.
    """
    rows = token_rows(batch, tokens)
    index = rows.position // pages.page_size
    page_ids = batch.page_table[rows.seq, jnp.clip(index, 0, batch.pages_per_seq - 1)]
    has_page = (rows.position >= 0) & (index < batch.pages_per_seq) & (page_ids > 0) & (page_ids < pages.num_pages)
    return jnp.where(has_page, page_ids, 0), rows.position % pages.page_size
