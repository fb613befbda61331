"""From the contract's arguments to a `pallas_call`, and back."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from paged_kernels.attention.tpu import arrange
from paged_kernels.attention.tpu.config import LANES, Config
from paged_kernels.attention.tpu.kernel import Scratch, attention_kernel
from paged_kernels.attention.tpu.schedule import make_tiles, max_tiles
from paged_kernels.attention.tpu.sizes import check_fits, default_block_sizes, q_rows_for
from paged_kernels.batch import RaggedBatch
from paged_kernels.block_sizes import BlockSizes
from paged_kernels.chip import Chip, chip_in_scope
from paged_kernels.layout import KVPages
from paged_kernels.spec import AttentionSpec

INTERPRET = pltpu.InterpretParams(
    dma_execution_mode="on_wait", out_of_bounds_reads="raise", uninitialized_memory="nan"
)
"""The interpreter at its strictest: copies as late as the hardware allows, and nothing read by luck."""


def paged_attention_tpu(
    q: Float[Array, "tokens q_heads head_dim"],
    pages: KVPages,
    batch: RaggedBatch,
    spec: AttentionSpec,
    block_sizes: BlockSizes | None,
    *,
    interpret: bool | pltpu.InterpretParams,
) -> tuple[Float[Array, "tokens q_heads head_dim"], Float[Array, "tokens q_heads"]]:
    """The output in `q.dtype` and the log-sum-exp of each row's logits (natural log, float32, -inf for no token).

    Args:
        q: the queries, float32 or bfloat16.
        pages: keys and values; head_dim 64 or a multiple of 128, float32 or bfloat16.
        batch: the sequences; `max_q_len=1` compiles for decode.
        spec: what to compute.
        block_sizes: `None` picks by chip.
        interpret: `True` for Pallas's TPU interpreter at its strictest, or the interpreter's own parameters.

    Raises:
        NotImplementedError: the shapes or types are none that the kernel has, or do not fit the chip's memories.
    """
    _check_supported(q, pages)
    chip = chip_in_scope()
    config = make_config(q, pages, batch, spec, block_sizes, chip)
    check_fits(config, chip, max_tiles(config.tokens, batch.seqs, config.q_rows) + 1)
    if config.tokens == 0:
        return q, jnp.zeros(q.shape[:2], jnp.float32)
    tiles = make_tiles(batch, spec, tokens=config.tokens, q_rows=config.q_rows, page_size=config.page_size)
    out, lse = pl.pallas_call(
        functools.partial(attention_kernel, config=config),
        in_specs=(
            jax.tree.map(lambda _: pl.BlockSpec(memory_space=pltpu.SMEM), tiles),
            *[pl.BlockSpec(memory_space=pl.ANY)] * 3,
        ),
        out_specs=(pl.BlockSpec(memory_space=pl.ANY),) * 2,
        out_shape=(
            jax.ShapeDtypeStruct((config.q_blocks, config.kv_heads, config.rows, config.lanes), q.dtype),
            jax.ShapeDtypeStruct((config.q_blocks, config.lse_rows // LANES, LANES), jnp.float32),
        ),
        scratch_shapes=(Scratch.shapes(config),),
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True, vmem_limit_bytes=chip.vmem_bytes),
        interpret=INTERPRET if interpret is True else interpret,
        name="paged_attention",
    )(tiles, arrange.arrange_table(batch.page_table, config), arrange.arrange_q(q, config), pages.data)
    return arrange.restore_output(out, config), arrange.restore_lse(lse, config)


def make_config(
    q: Array, pages: KVPages, batch: RaggedBatch, spec: AttentionSpec, block_sizes: BlockSizes | None, chip: Chip
) -> Config:
    """The kernel's static facts for these arguments."""
    tokens, q_heads, head_dim = q.shape
    group = q_heads // pages.num_kv_heads
    sizes = block_sizes or default_block_sizes(
        group=group,
        bytes_per_page=KVPages.bytes_per_page(pages.page_size, pages.num_kv_heads, head_dim, pages.dtype),
        page_size=pages.page_size,
        decode=batch.max_q_len == 1,
        chip=chip,
    )
    return Config(
        spec=spec,
        tokens=tokens,
        kv_heads=pages.num_kv_heads,
        group=group,
        head_dim=head_dim,
        page_size=pages.page_size,
        pages_per_seq=batch.pages_per_seq,
        q_rows=q_rows_for(tokens, batch.max_q_len, sizes.q_rows),
        kv_pages=min(sizes.kv_pages, batch.pages_per_seq),
        buffers=2,
        q_dtype=q.dtype,
        kv_dtype=pages.dtype,
    )


def _check_supported(q: Array, pages: KVPages) -> None:
    for name, dtype in (("q", q.dtype), ("pages", pages.dtype)):
        if dtype.name not in ("float32", "bfloat16"):
            raise NotImplementedError(
                f"{name} has dtype {dtype.name}; the TPU kernel has float32 and bfloat16: cast it, or use backend='xla'"
            )
    if pages.head_dim != LANES // 2 and pages.head_dim % LANES:
        raise NotImplementedError(
            f"head_dim={pages.head_dim} must be 64 or a multiple of 128 (the width of a register) for the TPU kernel; "
            "pad the heads, or use backend='xla'"
        )
    sublanes = 32 // pages.dtype.itemsize
    if pages.page_size % sublanes:
        raise NotImplementedError(
            f"page_size={pages.page_size} must be a multiple of {sublanes} (the height of a register of "
            f"{pages.dtype.name}) for the TPU kernel; use {sublanes} or more, or backend='xla'"
        )
