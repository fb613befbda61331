"""What the kernels need from a step's batch, made once for all layers."""

import dataclasses

import jax
from jaxtyping import Array, Int32

from paged_kernels._src.attention.tpu import arrange
from paged_kernels._src.attention.tpu.config import Config
from paged_kernels._src.attention.tpu.enlarge_pages import enlarge_page_table, joined_page_ids
from paged_kernels._src.attention.tpu.fit import LaunchConfig
from paged_kernels._src.attention.tpu.schedule import Tiles, make_tiles, page_block_starts
from paged_kernels._src.attention.tpu.singles import take_singles
from paged_kernels._src.batch import RaggedBatch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelWork:
    """What one kernel needs from a batch."""

    tiles: Tiles
    page_block_starts: Int32[Array, " q_blocks_plus_1"] | None
    """From `schedule.page_block_starts`; None except in decode."""
    page_table: Int32[Array, "seqs 1 table_ids"]
    tree: Int32[Array, "operands operand_rows tree_lanes"] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionWork:
    """What every layer's attention needs from a batch."""

    main: KernelWork
    """For `LaunchConfig.main`."""
    singles: KernelWork | None
    """For `LaunchConfig.singles`."""
    single_rows: Int32[Array, " seqs"] | None
    """The row of each single-row sequence; a number past the last row for the other sequences."""
    joined_ids: Int32[Array, "large_pages pages_joined"] | None
    """The pages to join into each large page; None if the kernels can copy the pages as they are."""


def prepare(batch: RaggedBatch, config: LaunchConfig) -> AttentionWork:
    """Returns the tiles, page tables and tree masks of a step."""
    with jax.enable_x64(False):  # the hardware has no 64-bit integers
        joined_ids = None
        if config.pages_joined > 1:
            joined_ids = joined_page_ids(batch.page_table, config.pages_joined)
            batch = enlarge_page_table(batch, config.pages_joined)
        if config.singles is None:
            main = _of_kernel(batch, config.main, config.num_pages)
            return AttentionWork(main=main, singles=None, single_rows=None, joined_ids=joined_ids)
        rows, singles, others = take_singles(batch, config.main.tokens)
        return AttentionWork(
            main=_of_kernel(others, config.main, config.num_pages),
            singles=_of_kernel(singles, config.singles, config.num_pages),
            single_rows=rows,
            joined_ids=joined_ids,
        )


def _of_kernel(batch: RaggedBatch, c: Config, num_pages: int) -> KernelWork:
    tiles = make_tiles(batch, c.spec, tokens=c.tokens, q_rows=c.q_rows, page_size=c.page_size)
    starts = None
    if c.decode:
        starts = page_block_starts(tiles, subblock_pages=c.subblock_pages, subblocks=c.subblocks)
    return KernelWork(
        tiles=tiles,
        page_block_starts=starts,
        page_table=arrange.arrange_page_table(batch.page_table, num_pages, c),
        tree=None if batch.tree_mask is None else arrange.arrange_tree(batch.tree_mask, c),
    )
