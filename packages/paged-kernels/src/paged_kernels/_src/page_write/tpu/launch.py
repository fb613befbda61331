"""Chooses the sizes of the page write on TPU, and calls its kernel."""

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Shaped

from paged_kernels._src.batch import RaggedBatch
from paged_kernels._src.call import WriteCall
from paged_kernels._src.integers import round_up
from paged_kernels._src.kv_layout import LARGEST
from paged_kernels._src.kv_pages import KVPages
from paged_kernels._src.page_write.slots import RowSlots, row_slots
from paged_kernels._src.page_write.tpu.copies import Buffers
from paged_kernels._src.page_write.tpu.kernel import write_runs_kernel
from paged_kernels._src.page_write.tpu.runs import Runs, list_runs, max_runs
from paged_kernels._src.tpu.interpreter import Interpret
from paged_kernels._src.tpu.registers import KERNEL_DTYPES, LANES, fills_words, register_rows

DTYPES = (*KERNEL_DTYPES, *LARGEST)
"""The types of pages that the kernel writes."""
SLOT_TILE = 8
"""Rows of a tile in HBM, for any type (XLA's T(8,128)). A copied part of a page starts and ends at a multiple of it."""
MAX_DEPTH = 16
"""The most runs in progress. Even a short copy takes about a microsecond to arrive."""
BUFFER_BYTES = 4 * 2**20
"""The most VMEM for all buffers: a quarter of the VMEM of v4, the smallest."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteSizes:
    """The static sizes of the kernel's buffers, in rows of one KV head."""

    span: int
    """Slots that are read and written together: whole tiles, and a divisor of the page size."""
    strip: int
    """New rows that are read for a run: whole registers, and at least `span`."""
    row_tile: int
    """Rows that fill a register. Strips start at a multiple of it, so that they are rolled register by register."""
    scale_strip: int
    """Tokens whose scales are read for a run: whole registers, and at least the lanes of a page's scales."""
    depth: int
    """The number of buffers."""

    @classmethod
    def of_span(cls, span: int, longest: int, pages: KVPages) -> "WriteSizes":
        """Returns the sizes for spans of `span` slots and runs of at most `longest` rows."""
        row_tile = register_rows(pages.data.dtype)
        # A run may start at the last row of a register.
        longest = min(longest, span)
        strip = max(span, round_up(row_tile - 1 + longest, row_tile))
        scale_strip = max(pages.layout.scale_lanes(pages.page_size), round_up(LANES - 1 + longest, LANES))
        depth = BUFFER_BYTES // ((span + strip) * _row_bytes(pages))
        return cls(
            span=span,
            strip=strip,
            row_tile=row_tile,
            scale_strip=scale_strip,
            depth=max(2, min(MAX_DEPTH, depth)),
        )

    @classmethod
    def choose(cls, pages: KVPages, max_q_len: int | None) -> "WriteSizes":
        """Returns the sizes for these pages.

        The span is the shortest that holds all new rows of a sequence in one page. It is shorter if the buffers would
        not fit.

        Raises:
            NotImplementedError: the pages have scales, so a span must be a page, and pages are too large for the
                buffers.
        """
        longest = min(max_q_len or pages.page_size, pages.page_size)
        tile = min(SLOT_TILE, pages.page_size)
        spans = [size for size in range(tile, pages.page_size + 1, tile) if pages.page_size % size == 0]
        if pages.scales is not None and longest > 1:
            _check_page_fits(pages)
            spans = [pages.page_size]  # otherwise two runs of one page could both write all of its scales
        enough = min(size for size in spans if size >= longest)
        choices = [cls.of_span(size, longest, pages) for size in spans if size <= enough]
        return max((sizes for sizes in choices if sizes.depth >= 4), key=lambda sizes: sizes.span, default=choices[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteConfig:
    """The static facts of a page write."""

    call: WriteCall
    sizes: WriteSizes | None
    """`None` for pages that cannot be copied as they are stored: XLA's scatter writes them."""


def fit(call: WriteCall) -> WriteConfig:
    """Returns the sizes for these shapes.

    Raises:
        NotImplementedError: the kernel does not have the type of the pages, or pages with scales are too large.
    """
    pages = call.pages
    if pages.dtype.name not in DTYPES:
        raise NotImplementedError(
            f"pages of {pages.dtype.name} cannot be written by the TPU kernel; use {', '.join(DTYPES)}, "
            "or backend='xla'"
        )
    return WriteConfig(call=call, sizes=WriteSizes.choose(pages, call.batch.max_q_len) if copies_fit(pages) else None)


def prepare(batch: RaggedBatch, config: WriteConfig) -> Runs | RowSlots:
    """Returns the runs of a step's rows or, for XLA's scatter, the place of each row."""
    call, sizes = config.call, config.sizes
    with jax.enable_x64(False):  # the hardware has no 64-bit integers
        slots = row_slots(call.pages, batch, call.tokens)
        if sizes is None:
            return slots
        return list_runs(*slots, span=sizes.span, size=max_runs(call.tokens, batch.max_seqs, sizes.span))


def write(
    pages: KVPages,
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads v_head_dim"] | None,
    work: Runs | RowSlots,
    *,
    config: WriteConfig,
    interpret: Interpret,
) -> KVPages:
    """Returns pages with each row in its slot, in place if `pages` is donated. Rows without a slot are dropped.

    Rows are packed first (`KVLayout.pack`). Slots that get no row keep their bits.

    Args:
        pages: one layer's pages.
        k: the new keys.
        v: the new values; `None` for latent pages.
        work: where the rows go, from `prepare`.
        config: the sizes, from `fit`.
        interpret: the parameters of Pallas's TPU interpreter; `False` compiles.
    """
    if isinstance(work, tuple):
        page_ids, slots = work
        return pages.put_entries(page_ids, slots, k, v)
    sizes = cast(WriteSizes, config.sizes)  # `prepare` made runs for them
    new = _new_by_head(*pages.layout.pack(k, v), sizes)
    with jax.enable_x64(False):  # the hardware has no 64-bit integers, so loops must not count in them
        data, *scales = _call_kernel(work, new, pages, sizes, interpret)
        return dataclasses.replace(pages, data=data, scales=scales[0] if scales else None)


def copies_fit(pages: KVPages) -> bool:
    """True if these pages can be copied as they are stored.

    Their rows fill whole words, and their number is a divisor of a register or a multiple of a tile. XLA stores other
    pages (one slot of bfloat16, 12 of anything) in another order.
    """
    size, dtype = pages.page_size, pages.data.dtype
    register = register_rows(dtype)
    tile = register if dtype.itemsize == 1 else SLOT_TILE
    return fills_words(size, dtype) and (register % size == 0 or size % tile == 0)


def _call_kernel(
    runs: Runs, new: tuple[Array, ...], pages: KVPages, sizes: WriteSizes, interpret: Interpret
) -> tuple[Array, ...]:
    old = (pages.data,) if pages.scales is None else (pages.data, pages.scales)
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    first_old = len(jax.tree.leaves(runs)) + len(new)
    return pl.pallas_call(
        functools.partial(write_runs_kernel, span=sizes.span, page_size=pages.page_size),
        out_shape=[tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in old)],
        in_specs=[
            jax.tree.map(lambda _: pl.BlockSpec(memory_space=pltpu.SMEM), runs),
            (hbm,) * len(new),
            (hbm,) * len(old),
        ],
        out_specs=[(hbm,) * len(old)],
        scratch_shapes=[_buffers(pages, sizes)],
        input_output_aliases={first_old + i: i for i in range(len(old))},
        # All page ids are in 1..num_pages-1, and no strip reaches past the rows.
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True),
        interpret=interpret,
        name="write_kv",
    )(runs, new, old)[0]


def _buffers(pages: KVPages, sizes: WriteSizes) -> tuple[Any, ...]:
    """Returns the `Buffers` to allocate, for the rows and for the scales."""
    semaphores = pltpu.SemaphoreType.DMA((sizes.depth,))

    def buffers(span: tuple[int, ...], strip: tuple[int, ...], dtype: Any) -> Any:
        spans, strips = (pltpu.VMEM((sizes.depth, *shape), dtype) for shape in (span, strip))
        return Buffers(spans, strips, span_read=semaphores, strip_read=semaphores, span_written=semaphores)

    heads, lanes, kinds = pages.num_kv_heads, pages.layout.storage_lanes, pages.layout.scales_per_entry
    rows = buffers((heads, sizes.span, lanes), (heads, sizes.strip, lanes), pages.data.dtype)
    if pages.scales is None:
        return (rows,)
    return rows, buffers((heads, pages.scales.shape[-1]), (kinds, heads, sizes.scale_strip), pages.scales.dtype)


def _new_by_head(
    rows: Shaped[Array, "tokens kv_heads lanes"],
    scales: Float[Array, "tokens kv_heads kinds"] | None,
    sizes: WriteSizes,
) -> tuple[Array, ...]:
    """Returns rows `[kv_heads, rows, lanes]` and scales `[kinds, kv_heads, rows]`, padded to registers and a strip."""

    def pad(array: Array, axis: int, unit: int, least: int) -> Array:
        tokens = array.shape[axis]
        widths = [(0, 0)] * array.ndim
        widths[axis] = (0, max(round_up(tokens, unit), least) - tokens)
        return jnp.pad(array, widths)

    padded = pad(jnp.swapaxes(rows, 0, 1), 1, sizes.row_tile, sizes.strip)
    return (padded,) if scales is None else (padded, pad(scales.T, 2, LANES, sizes.scale_strip))


def _row_bytes(pages: KVPages) -> int:
    return pages.num_kv_heads * pages.layout.storage_lanes * pages.data.dtype.itemsize


def _check_page_fits(pages: KVPages) -> None:
    page_bytes = pages.page_size * _row_bytes(pages)
    if page_bytes > BUFFER_BYTES // 2:
        raise NotImplementedError(
            f"page_size={pages.page_size} makes pages of {page_bytes} bytes; the TPU kernel writes pages with scales "
            f"of at most {BUFFER_BYTES // 2} bytes; use smaller pages, or backend='xla'"
        )
