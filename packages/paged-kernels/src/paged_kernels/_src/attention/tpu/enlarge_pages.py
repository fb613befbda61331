"""Page sizes whose rows fill no whole words or tiles of a TPU's memory: gathered to larger pages before the kernel."""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Shaped

from paged_kernels._src.batch import RaggedBatch
from paged_kernels._src.kv_pages import KVPages
from paged_kernels._src.tpu.registers import LANES, cdiv, fills_words, register_rows


def native_page_size(pages: KVPages) -> int:
    """The least multiple of the page size that the kernel's copies can have: the page size itself, where it is one.

    A page's rows must fill words of 32 bits, and be a divisor or a multiple of a register's rows: other shapes XLA
    keeps in another order, and would copy the whole of them for a kernel. Scales must fill registers in the same way.
    """
    size = pages.page_size
    tile = register_rows(pages.data.dtype)
    if tile % size or not fills_words(size, pages.data.dtype):
        size = math.lcm(size, tile)
    if pages.scales is not None and LANES % size:
        size = math.lcm(size, LANES)
    return size


def enlarge_pages(pages: KVPages, batch: RaggedBatch) -> tuple[KVPages, RaggedBatch]:
    """The same keys in pages that the kernel's copies can have, and the batch that finds them there.

    Where the page size is not such, every page of the page table is copied: right, but slow, and with memory for as
    many tokens as the table has target.
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
