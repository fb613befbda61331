"""Joins pages into larger ones where the TPU kernel cannot copy pages of this size."""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Int32, Shaped

from paged_kernels._src.batch import RaggedBatch
from paged_kernels._src.integers import cdiv
from paged_kernels._src.kv_pages import KVPages
from paged_kernels._src.tpu.registers import LANES, fills_words, register_rows


def native_page_size(pages: KVPages) -> int:
    """The smallest multiple of the page size that the kernel can copy; the page size itself if possible.

    The entries of a page must fill whole 32-bit words. Their number must divide, or be a multiple of, the rows of a
    register. XLA stores other shapes in another order, and would copy all of them before each kernel call. Scales must
    fill registers in the same way.
    """
    size = pages.page_size
    tile = register_rows(pages.data.dtype)
    if tile % size or not fills_words(size, pages.data.dtype):
        size = math.lcm(size, tile)
    if pages.scales is not None and LANES % size:
        size = math.lcm(size, LANES)
    return size


def joined_page_ids(
    page_table: Int32[Array, "seqs pages_per_seq"], pages_joined: int
) -> Int32[Array, "large_pages pages_joined"]:
    """Returns the pages that make up each large page: the page table's pages in order, so many at a time."""
    padding = -page_table.shape[1] % pages_joined
    return jnp.pad(page_table, ((0, 0), (0, padding))).reshape(-1, pages_joined)


def enlarge_page_table(batch: RaggedBatch, pages_joined: int) -> RaggedBatch:
    """Returns the batch whose page table points into the large pages."""
    width = cdiv(batch.pages_per_seq, pages_joined)
    page_table = jnp.arange(batch.max_seqs * width, dtype=jnp.int32).reshape(-1, width)
    return dataclasses.replace(batch, page_table=page_table)


def enlarge_pages(pages: KVPages, joined_ids: Int32[Array, "large_pages pages_joined"]) -> KVPages:
    """Returns pages that the kernel can copy.

    Every page in the page table is copied. This is correct but slow, and needs memory for as many tokens as the page
    table can hold.
    """
    entries, scales = pages.take(joined_ids)
    return KVPages.from_entries(_join(entries), None if scales is None else _join(scales), pages.layout)


def enlarge(pages: KVPages, batch: RaggedBatch) -> tuple[KVPages, RaggedBatch]:
    """Returns the large pages, and the batch whose page table points into them."""
    pages_joined = native_page_size(pages) // pages.page_size
    joined_ids = joined_page_ids(batch.page_table, pages_joined)
    return enlarge_pages(pages, joined_ids), enlarge_page_table(batch, pages_joined)


def _join(
    pages: Shaped[Array, "groups count kv_heads page_size width"],
) -> Shaped[Array, "groups kv_heads group_size width"]:
    large_per_seq, count, heads, size, width = pages.shape
    return jnp.swapaxes(pages, 1, 2).reshape(large_per_seq, heads, count * size, width)
