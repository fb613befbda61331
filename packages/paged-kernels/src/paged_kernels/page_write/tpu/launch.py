"""The page write on TPUs: its sizes, and the call of the kernel."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Shaped

from paged_kernels.batch import RaggedBatch
from paged_kernels.layout import KVPages
from paged_kernels.mosaic import KERNEL_DTYPES, Interpret, interpreter, round_up
from paged_kernels.page_write.slots import row_slots
from paged_kernels.page_write.tpu.kernel import Buffers, write_runs_kernel
from paged_kernels.page_write.tpu.runs import Runs, max_runs, plan_runs
from paged_kernels.page_write.xla import write_kv_xla
from paged_kernels.row_layout import LARGEST

DTYPES = (*KERNEL_DTYPES, *LARGEST)
"""The types of pages that it takes."""
SLOT_TILE = 8
"""Rows of a tile in HBM, of any type (XLA's T(8,128)); part of a page starts and ends at a multiple of it."""
WORD_BYTES = 4
"""Bytes of a lane in a register; a copy moves whole words, which hold rows of one lane."""
MAX_DEPTH = 16
"""Runs under way at once; a copy takes about a microsecond to arrive, however short it is."""
BUFFER_BYTES = 4 * 2**20
"""Most VMEM for all buffers together: a quarter of what v4, which has least, has."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteSizes:
    """The static sizes of the kernel's buffers, in rows of one KV head."""

    span: int
    """Slots that are read and written together: whole tiles, and a divisor of the page size."""
    strip: int
    """New rows that are read for a run: whole row tiles, and no fewer than `span`."""
    row_tile: int
    """Rows that fill a register; strips start at a multiple of it, so that they are rolled register by register."""
    depth: int
    """Buffers."""

    @classmethod
    def of_span(cls, span: int, longest: int, pages: KVPages) -> "WriteSizes":
        """The sizes for spans of this many slots and runs of at most `longest` rows."""
        row_tile = SLOT_TILE * 4 // pages.data.dtype.itemsize
        # The run may start at the last row of a tile.
        strip = max(span, round_up(row_tile - 1 + min(longest, span), row_tile))
        row_bytes = pages.num_kv_heads * pages.row.storage_lanes * pages.data.dtype.itemsize
        depth = BUFFER_BYTES // ((span + strip) * row_bytes)
        return cls(span=span, strip=strip, row_tile=row_tile, depth=max(2, min(MAX_DEPTH, depth)))

    @classmethod
    def choose(cls, pages: KVPages, max_q_len: int | None) -> "WriteSizes":
        """The sizes for these pages: spans just long enough for a sequence's rows, of a page at most, that fit well."""
        longest = min(max_q_len or pages.page_size, pages.page_size)
        tile = min(SLOT_TILE, pages.page_size)
        spans = [size for size in range(tile, pages.page_size + 1, tile) if pages.page_size % size == 0]
        enough = min(size for size in spans if size >= longest)
        choices = [cls.of_span(size, longest, pages) for size in spans if size <= enough]
        return max((sizes for sizes in choices if sizes.depth >= 4), key=lambda sizes: sizes.span, default=choices[0])


def write_kv_tpu(
    pages: KVPages,
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads v_head_dim"] | None,
    batch: RaggedBatch,
    *,
    interpret: Interpret,
) -> KVPages:
    """Pages with each row in its slot, in place if `pages` is donated; rows that go nowhere are dropped.

    Rows are packed first (`RowLayout.pack`); the bytes of slots that get no row do not change. Scales, a few bytes a
    row, are scattered by XLA, and so are the rows where no copy can move a page.

    Args:
        pages: one layer's pages.
        k: the new keys.
        v: the new values; `None` for latent pages.
        batch: where the rows go; `max_q_len` bounds how much of a page is read and written for a few rows.
        interpret: `True` for Pallas's TPU interpreter at its strictest, or the interpreter's own parameters.

    Raises:
        NotImplementedError: the pages have a type that the hardware does not.
    """
    if pages.dtype.name not in DTYPES:
        raise NotImplementedError(
            f"pages of {pages.dtype.name} cannot be written by the TPU kernel; use {', '.join(DTYPES)}, or backend='xla'"
        )
    if not copies_fit(pages):
        return write_kv_xla(pages, k, v, batch)
    sizes = WriteSizes.choose(pages, batch.max_q_len)
    tokens = k.shape[0]
    rows, scales = pages.row.pack(k, v)
    rows = _by_head(rows, sizes)
    with jax.enable_x64(False):  # the hardware has no 64-bit integers, which loops would otherwise count in
        page_ids, slots = row_slots(pages, batch, tokens)
        runs = plan_runs(page_ids, slots, span=sizes.span, size=max_runs(tokens, batch.seqs, sizes.span))
        data = _call_kernel(runs, rows, pages, sizes, interpreter(interpret))
        return dataclasses.replace(pages, data=data, scales=pages.put_scales(page_ids, slots, scales))


def copies_fit(pages: KVPages) -> bool:
    """Whether copies can move these pages as they lie: whole words, and whole tiles or a divisor of one.

    Other pages (of bfloat16 with one slot, of 12 slots) XLA keeps in another order.
    """
    itemsize = pages.data.dtype.itemsize
    tile = SLOT_TILE * max(1, WORD_BYTES // itemsize // 2)
    divides = SLOT_TILE * WORD_BYTES // itemsize % pages.page_size == 0
    return pages.page_size * itemsize % WORD_BYTES == 0 and (divides or pages.page_size % tile == 0)


def _call_kernel(runs: Runs, rows: Array, pages: KVPages, sizes: WriteSizes, interpret: Interpret) -> Array:
    return pl.pallas_call(
        functools.partial(write_runs_kernel, row_tile=sizes.row_tile),
        out_shape=jax.ShapeDtypeStruct(pages.data.shape, pages.data.dtype),
        in_specs=[
            jax.tree.map(lambda _: pl.BlockSpec(memory_space=pltpu.SMEM), runs),
            pl.BlockSpec(memory_space=pltpu.HBM),
            pl.BlockSpec(memory_space=pltpu.HBM),
        ],
        out_specs=pl.BlockSpec(memory_space=pltpu.HBM),
        scratch_shapes=[_buffers(pages, sizes)],
        input_output_aliases={len(jax.tree.leaves(runs)) + 1: 0},
        # The plan holds no page but 1..num_pages-1, and no strip leaves the rows.
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True),
        interpret=interpret,
        name="write_kv",
    )(runs, rows, pages.data)


def _buffers(pages: KVPages, sizes: WriteSizes) -> Any:
    """The `Buffers` to allocate."""

    def vmem(rows: int) -> Any:
        return pltpu.VMEM((sizes.depth, pages.num_kv_heads, rows, pages.row.storage_lanes), pages.data.dtype)

    semaphores = pltpu.SemaphoreType.DMA((sizes.depth,))
    return Buffers(
        spans=vmem(sizes.span),
        strips=vmem(sizes.strip),
        span_read=semaphores,
        strip_read=semaphores,
        span_written=semaphores,
    )


def _by_head(rows: Shaped[Array, "tokens kv_heads lanes"], sizes: WriteSizes) -> Shaped[Array, "kv_heads rows lanes"]:
    """The rows head by head, padded to whole tiles and to at least one strip."""
    tokens = rows.shape[0]
    padding = max(round_up(tokens, sizes.row_tile), sizes.strip) - tokens
    return jnp.pad(jnp.swapaxes(rows, 0, 1), ((0, 0), (0, padding), (0, 0)))
