"""Joins pages into larger ones where the TPU kernel cannot copy pages of this size."""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from paged_kernels._src.batch import RaggedBatch
from paged_kernels._src.kv_pages import KVPages
from paged_kernels._src.tpu.registers import LANES, cdiv, fills_words, register_rows


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


def enlarge_pages(pages: KVPages, batch: RaggedBatch) -> tuple[KVPages, RaggedBatch]:
    """Returns pages that the kernel can copy, and a batch whose page table points into them.

    If the page size is already native, both are returned as they are. Otherwise every page in the page table is copied.
    This is correct but slow, and needs memory for as many tokens as the page table can hold.
    """
    count = native_page_size(pages) // pages.page_size
    if count == 1:
        return pages, batch
    large_per_seq = cdiv(batch.pages_per_seq, count)
    page_table = jnp.pad(batch.page_table, ((0, 0), (0, large_per_seq * count - batch.pages_per_seq)))
    ids = page_table.reshape(-1, count)
    entries, scales = pages.take(ids)
    large_pages = KVPages.from_entries(_join(entries), None if scales is None else _join(scales), pages.layout)
    page_table = jnp.arange(len(ids), dtype=jnp.int32).reshape(-1, large_per_seq)
    return large_pages, dataclasses.replace(batch, page_table=page_table)


def _join(
    pages: Shaped[Array, "groups count kv_heads page_size width"],
) -> Shaped[Array, "groups kv_heads group_size width"]:
    large_per_seq, count, heads, size, width = pages.shape
    return jnp.swapaxes(pages, 1, 2).reshape(large_per_seq, heads, count * size, width)
