"""The kernel's inputs and its scratch memory."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paged_kernels._src.attention.tpu import arrange
from paged_kernels._src.attention.tpu.config import Config, Memory
from paged_kernels._src.attention.tpu.copies import PageBuffers, RowBuffers
from paged_kernels._src.attention.tpu.prepare import KernelWork
from paged_kernels._src.attention.tpu.subblocks import notes_shape
from paged_kernels._src.head_params import HeadParams
from paged_kernels._src.kv_pages import KVPages
from paged_kernels._src.tpu.registers import LANES


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelInputs:
    """The kernel's arrays besides its tiles; `None` for what the call does not use."""

    page_table: Memory  # HBM [seqs, 1, ids_per_seq]
    q: Memory  # HBM [operands, parts, part_rows, q_lanes]
    data: Memory  # HBM [pages, kv_heads, page_size, storage_lanes]
    scales: Memory  # HBM [pages, kv_heads, 1, scale_lanes], or None
    tree: Memory  # HBM [operands, operand_tokens, tree_lanes], or None
    sinks: Memory  # VMEM [parts, head_rows, 128], to base 2, or None
    slopes: Memory  # VMEM [parts, head_rows, 128], to base 2, or None

    @classmethod
    def arranged(
        cls, q: jax.Array, pages: KVPages, work: KernelWork, head_params: HeadParams, c: Config
    ) -> "KernelInputs":
        """Returns the arguments of the call, in the order and types that the kernel reads."""
        return cls(
            page_table=work.page_table,
            q=arrange.arrange_q(q, c),
            data=pages.data,
            scales=pages.scales,
            tree=work.tree,
            sinks=None if head_params.sinks is None else arrange.arrange_heads(head_params.sinks, c),
            slopes=None if head_params.alibi_slopes is None else arrange.arrange_heads(head_params.alibi_slopes, c),
        )

    def specs(self) -> "KernelInputs":
        """Returns the memory space of each array."""
        hbm = jax.tree.map(lambda _: pl.BlockSpec(memory_space=pl.ANY), self)
        vmem = pl.BlockSpec(memory_space=pltpu.VMEM)
        return dataclasses.replace(
            hbm, sinks=self.sinks if self.sinks is None else vmem, slopes=self.slopes if self.slopes is None else vmem
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Scratch:
    """The kernel's scratch memory. `m`, `l` and `acc` hold a `softmax.State`. `lse` is repeated along lanes."""

    pages: PageBuffers
    rows: RowBuffers
    m: Memory  # [parts, part_rows, 128]
    l: Memory  # [parts, part_rows, 128]  # noqa: E741
    acc: Memory  # [parts, part_rows, out_lanes]
    lse: Memory  # [lse_rows, 128], in decode one operand more for empty sub-blocks; or None
    scales: Memory  # [kinds, kv_heads, keys of Config.scales_shape], or None
    notes: Memory  # SMEM, `notes_shape`, in decode; or None

    @classmethod
    def shapes(cls, c: Config) -> "Scratch":
        """Returns what to allocate."""
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
