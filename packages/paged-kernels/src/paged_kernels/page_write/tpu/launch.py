"""The page write on TPUs: its sizes, and the call of the kernel."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from paged_kernels.batch import RaggedBatch
from paged_kernels.layout import KVPages
from paged_kernels.page_write.slots import row_slots
from paged_kernels.page_write.tpu.kernel import Buffers, write_runs_kernel
from paged_kernels.page_write.tpu.runs import max_runs, plan_runs

ROW_TILE = {"float32": 8, "bfloat16": 16}
"""Rows of one VMEM tile; copies start and end at multiples of it."""
MAX_DEPTH = 16
"""Runs under way at once; a copy takes a microsecond or two to arrive, however short it is."""
BUFFER_BYTES = 4 * 2**20
"""VMEM for all buffers together: a quarter of the least that a kernel may use by default on the five generations."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteSizes:
    """The static sizes of the kernel's buffers, in rows of one KV head."""

    tile: int
    """Rows of a tile."""
    group: int
    """Slots that are read and written together: whole tiles, and a divisor of the page size."""
    window: int
    """New rows that are read for a run: whole tiles, enough for the longest run wherever it starts in a tile."""
    depth: int
    """Buffers."""

    @classmethod
    def choose(cls, pages: KVPages, max_q_len: int | None) -> "WriteSizes":
        """The sizes for these pages; one tile where a sequence has few rows, else as much of a page as is well.

        Raises:
            NotImplementedError: the pages have a type or a size that the kernel cannot copy.
        """
        tile = _row_tile(pages)
        row_bytes = pages.num_kv_heads * 2 * pages.head_dim * pages.dtype.itemsize
        longest = pages.page_size if max_q_len is None else min(max_q_len, pages.page_size)

        def of_group(group: int) -> "WriteSizes":
            window = max(group, _round_up(tile - 1 + min(longest, group), tile))
            depth = BUFFER_BYTES // ((group + window) * row_bytes)
            return cls(tile=tile, group=group, window=window, depth=max(2, min(MAX_DEPTH, depth)))

        groups = [size for size in range(tile, pages.page_size + 1, tile) if pages.page_size % size == 0]
        wanted = next((size for size in groups if size >= longest), pages.page_size)
        return next(
            (sizes for sizes in map(of_group, reversed(groups)) if sizes.group <= wanted and sizes.depth > 2),
            of_group(tile),
        )


def write_kv_tpu(
    pages: KVPages,
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    batch: RaggedBatch,
    *,
    interpret: bool,
) -> KVPages:
    """Pages with each row's `K‖V` in its slot, in place if `pages` is donated; rows that go nowhere are dropped.

    Rows are rounded to the pages' dtype first; bytes of slots that get no row are never changed.

    Raises:
        NotImplementedError: the pages have a type or a size that the kernel cannot copy.
    """
    sizes = WriteSizes.choose(pages, batch.max_q_len)
    tokens = k.shape[0]
    if tokens == 0:
        return pages
    page_ids, slots = row_slots(pages, batch, tokens)
    runs = plan_runs(page_ids, slots, group=sizes.group, size=max_runs(tokens, batch.seqs, sizes.group))
    rows = _kernel_rows(k, v, pages, sizes)
    data = pl.pallas_call(
        functools.partial(write_runs_kernel, row_tile=sizes.tile),
        out_shape=jax.ShapeDtypeStruct(pages.data.shape, pages.dtype),
        in_specs=[
            jax.tree.map(lambda _: pl.BlockSpec(memory_space=pltpu.SMEM), runs),
            pl.BlockSpec(memory_space=pltpu.HBM),
            pl.BlockSpec(memory_space=pltpu.HBM),
        ],
        out_specs=pl.BlockSpec(memory_space=pltpu.HBM),
        scratch_shapes=[_buffers(pages, sizes)],
        input_output_aliases={len(jax.tree.leaves(runs)) + 1: 0},
        # The plan holds no page but 1..num_pages-1, and no window leaves the rows.
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="write_kv",
    )(runs, rows, pages.data)
    return KVPages(data)


def _buffers(pages: KVPages, sizes: WriteSizes) -> Buffers:
    def vmem(rows: int) -> Any:
        return pltpu.VMEM((sizes.depth, pages.num_kv_heads, rows, 2 * pages.head_dim), pages.dtype)

    semaphores = pltpu.SemaphoreType.DMA((sizes.depth,))
    return Buffers(
        groups=vmem(sizes.group),
        windows=vmem(sizes.window),
        group_read=semaphores,
        window_read=semaphores,
        group_written=semaphores,
    )


def _kernel_rows(
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    pages: KVPages,
    sizes: WriteSizes,
) -> Float[Array, "kv_heads rows two_head_dim"]:
    """The rows as pages hold them, head by head, padded to whole tiles and to at least one window."""
    kv = jnp.concatenate([k, v], axis=-1).astype(pages.dtype)
    tokens = kv.shape[0]
    padding = max(_round_up(tokens, sizes.tile), sizes.window) - tokens
    return jnp.pad(jnp.swapaxes(kv, 0, 1), ((0, 0), (0, padding), (0, 0)))


def _row_tile(pages: KVPages) -> int:
    tile = ROW_TILE.get(pages.dtype.name)
    if tile is None:
        raise NotImplementedError(
            f"pages of {pages.dtype.name} cannot be written by the TPU kernel; use {' or '.join(ROW_TILE)}, "
            "or backend='xla'"
        )
    if pages.page_size % tile:
        raise NotImplementedError(
            f"page_size={pages.page_size} must be a multiple of {tile} (rows of a {pages.dtype.name} tile) for the "
            f"TPU kernel; use {tile} or a multiple, or backend='xla'"
        )
    return tile


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
