"""What the kernel is given and what it allocates."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paged_kernels._src.attention.tpu import arrange
from paged_kernels._src.attention.tpu.config import Config, Memory
from paged_kernels._src.attention.tpu.copies import PageBuffers, RowBuffers
from paged_kernels._src.attention.tpu.subblocks import notes_shape
from paged_kernels._src.batch import RaggedBatch
from paged_kernels._src.head_params import HeadParams
from paged_kernels._src.kv_pages import KVPages
from paged_kernels._src.tpu.registers import LANES


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelInputs:
    """The kernel's arrays besides its tiles; `None` for what is not asked."""

    page_table: Memory  # HBM [seqs, 1, table_ids]
    q: Memory  # HBM [operands, parts, rows, q_lanes]
    data: Memory  # HBM [pages, kv_heads, page_size, storage_lanes]
    scales: Memory  # HBM [pages, kv_heads, 1, scale_lanes], or None
    tree: Memory  # HBM [operands, operand_tokens, tree_lanes], or None
    sinks: Memory  # VMEM [parts, head_rows, 128], to base 2, or None
    slopes: Memory  # VMEM [parts, head_rows, 128], to base 2, or None

    @classmethod
    def arranged(
        cls, q: jax.Array, pages: KVPages, batch: RaggedBatch, head_params: HeadParams, c: Config
    ) -> "KernelInputs":
        """The contract's arguments as the kernel wants them."""
        return cls(
            page_table=arrange.arrange_page_table(batch.page_table, pages.num_pages, c),
            q=arrange.arrange_q(q, c),
            data=pages.data,
            scales=pages.scales,
            tree=None if batch.tree_mask is None else arrange.arrange_tree(batch.tree_mask, c),
            sinks=None if head_params.sinks is None else arrange.arrange_heads(head_params.sinks, c),
            slopes=None if head_params.alibi_slopes is None else arrange.arrange_heads(head_params.alibi_slopes, c),
        )

    def specs(self) -> "KernelInputs":
        """Where each of them is to be."""
        hbm = jax.tree.map(lambda _: pl.BlockSpec(memory_space=pl.ANY), self)
        vmem = pl.BlockSpec(memory_space=pltpu.VMEM)
        return dataclasses.replace(
            hbm, sinks=self.sinks if self.sinks is None else vmem, slopes=self.slopes if self.slopes is None else vmem
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Scratch:
    """The kernel's memory. `m`, `l` and `acc` make a `softmax.State`; `lse` is repeated along lanes."""

    pages: PageBuffers
    rows: RowBuffers
    m: Memory  # [parts, rows, 128]
    l: Memory  # [parts, rows, 128]  # noqa: E741
    acc: Memory  # [parts, rows, out_lanes]
    lse: Memory  # [lse_rows, 128], in decode with an operand more for sub-blocks of no sequence; or None
    scales: Memory  # [kinds, kv_heads, block_tokens, and more to whole registers], or None
    notes: Memory  # SMEM, of decode's sub-blocks, or None

    @classmethod
    def shapes(cls, c: Config) -> "Scratch":
        """What to allocate."""
        scales = (c.layout.scales_per_entry, c.kv_heads, c.scales_shape[0] * c.page_size)
        return cls(
            pages=PageBuffers.shapes(c),
            rows=RowBuffers.shapes(c),
            m=pltpu.VMEM((c.parts, c.part_rows, LANES), jnp.float32),
            l=pltpu.VMEM((c.parts, c.part_rows, LANES), jnp.float32),
            acc=pltpu.VMEM((c.parts, c.part_rows, c.out_lanes), jnp.float32),
            lse=pltpu.VMEM((c.lse_rows + c.decode * c.parts * c.part_rows, LANES), jnp.float32) if c.has_lse else None,
            scales=pltpu.VMEM(scales, jnp.float32) if c.layout.is_quantised else None,
            notes=notes_shape(c) if c.decode else None,
        )
