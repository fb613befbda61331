"""From the contract's arguments to a `pallas_call`, and back."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from paged_kernels._src.attention.block_sizes import BlockSizes
from paged_kernels._src.attention.tpu import arrange
from paged_kernels._src.attention.tpu.config import Config
from paged_kernels._src.attention.tpu.decode import decode_kernel
from paged_kernels._src.attention.tpu.enlarge_pages import enlarge_pages
from paged_kernels._src.attention.tpu.kernel import attention_kernel
from paged_kernels._src.attention.tpu.memory import KernelInputs, Scratch
from paged_kernels._src.attention.tpu.schedule import make_tiles, max_tiles, page_block_starts
from paged_kernels._src.attention.tpu.singles import take_singles
from paged_kernels._src.attention.tpu.sizes import (
    BUFFERS,
    MIN_Q_ROWS,
    check_fits,
    preferred_block_sizes,
    q_rows_for,
    shrink_to_fit,
    with_kv_pages,
)
from paged_kernels._src.batch import RaggedBatch
from paged_kernels._src.call import AttentionCall
from paged_kernels._src.head_params import HeadParams
from paged_kernels._src.kv_pages import KVPages
from paged_kernels._src.spec import AttentionSpec
from paged_kernels._src.tpu.chip import Chip, chip_in_scope
from paged_kernels._src.tpu.interpreter import Interpret
from paged_kernels._src.tpu.registers import KERNEL_DTYPES, LANES
from paged_kernels._src.tpu.tuning.lookup import Shape, lookup


def paged_attention_tpu(
    q: Float[Array, "tokens q_heads head_dim"],
    pages: KVPages,
    batch: RaggedBatch,
    spec: AttentionSpec,
    head_params: HeadParams,
    *,
    block_sizes: BlockSizes | None,
    interpret: Interpret,
    return_lse: bool = True,
) -> tuple[Float[Array, "tokens q_heads v_head_dim"], Float[Array, "tokens q_heads"] | None]:
    """The output in `q.dtype` and the log-sum-exp of each row's logits (natural log, float32, -inf for no token).

    Args:
        q: the queries, float32 or bfloat16.
        pages: keys and values, float32, bfloat16 or a type with scales.
        batch: the sequences; `max_q_len=1` compiles for decode.
        spec: what to compute.
        head_params: sinks and ALiBi slopes.
        block_sizes: `None` picks by chip.
        interpret: the parameters of Pallas's TPU interpreter; `False` compiles.
        return_lse: whether to compute the log-sum-exp, which is `None` otherwise.

    Raises:
        NotImplementedError: the shapes or types are none that the kernel has, or do not fit the chip's memories.
    """
    _check_supported(q, pages)
    pages, batch = enlarge_pages(pages, batch)
    chip = chip_in_scope()

    def attend(q, batch, block_sizes):
        config = make_config(q, pages, batch, spec, head_params, block_sizes=block_sizes, chip=chip)
        config = dataclasses.replace(config, has_lse=return_lse)
        check_fits(config, chip, max_tiles(config.tokens, batch.max_seqs, config.q_rows) + 1)
        with jax.enable_x64(False):  # the hardware has no 64-bit integers, which loops would otherwise count in
            inputs = KernelInputs.arranged(q, pages, batch, head_params, config)
            return _call_kernel(inputs, batch, config, chip=chip, interpret=interpret)

    q_rows = make_config(q, pages, batch, spec, head_params, block_sizes=block_sizes, chip=chip).q_rows
    # A row alone costs no more than a small block. A batch of one sequence is taken to be no decode.
    if q_rows <= MIN_Q_ROWS or batch.max_q_len == 1 or batch.max_seqs == 1:
        return attend(q, batch, block_sizes)
    rows, singles, rest = take_singles(batch, len(q))
    of_singles = attend(q.at[rows].get(mode="clip"), singles, None)
    of_rest = attend(q, rest, block_sizes)
    return jax.tree.map(lambda all_rows, x: all_rows.at[rows].set(x, mode="drop"), of_rest, of_singles)


def fit(call: AttentionCall, block_sizes: BlockSizes | None) -> None:
    """Refuse a call that the kernel does not have.

    Raises:
        NotImplementedError: says why.
    """
    _check_supported(call.q, call.pages)
    pages, batch = jax.eval_shape(enlarge_pages, call.pages, call.batch)
    chip = chip_in_scope()
    config = make_config(call.q, pages, batch, call.spec, call.head_params, block_sizes=block_sizes, chip=chip)
    check_fits(config, chip, max_tiles(config.tokens, batch.max_seqs, config.q_rows) + 1)


def _call_kernel(inputs: KernelInputs, batch: RaggedBatch, config: Config, *, chip: Chip, interpret: Interpret):
    c = config
    tiles = make_tiles(batch, c.spec, tokens=c.tokens, q_rows=c.q_rows, page_size=c.page_size)
    work, kernel = (tiles,), attention_kernel
    if c.decode:
        work, kernel = (
            (tiles, page_block_starts(tiles, subblock_pages=c.subblock_pages, subblocks=c.subblocks)),
            decode_kernel,
        )
    out, lse = pl.pallas_call(
        functools.partial(kernel, config=c),
        in_specs=(*jax.tree.map(lambda _: pl.BlockSpec(memory_space=pltpu.SMEM), work), inputs.specs()),
        out_specs=(pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pl.ANY) if c.has_lse else None),
        out_shape=(
            jax.ShapeDtypeStruct((c.q_blocks * c.operands, c.parts, c.part_rows, c.out_lanes), c.q_dtype),
            jax.ShapeDtypeStruct((c.q_blocks, c.lse_rows // LANES, LANES), jnp.float32) if c.has_lse else None,
        ),
        scratch_shapes=(Scratch.shapes(c),),  # pyright: ignore[reportArgumentType] -- any pytree will do
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True, vmem_limit_bytes=chip.vmem_bytes),
        interpret=interpret,
        name="paged_attention",
    )(*work, inputs)
    return arrange.restore_output(out, c), arrange.restore_lse(lse, c) if c.has_lse else None


def make_config(
    q: Array,
    pages: KVPages,
    batch: RaggedBatch,
    spec: AttentionSpec,
    head_params: HeadParams,
    *,
    block_sizes: BlockSizes | None,
    chip: Chip,
) -> Config:
    """The kernel's static facts for these arguments."""
    tokens, q_heads, _ = q.shape
    q_per_kv = q_heads // pages.num_kv_heads
    sizes = block_sizes or default_block_sizes(q, pages, batch, chip)
    config = Config(
        spec=spec,
        tokens=tokens,
        kv_heads=pages.num_kv_heads,
        q_per_kv=q_per_kv,
        layout=pages.layout,
        page_size=pages.page_size,
        pages_per_seq=batch.pages_per_seq,
        q_rows=q_rows_for(tokens, batch.max_q_len, sizes.q_rows),
        kv_pages=1,
        subblock_pages=1,
        buffers=BUFFERS,
        q_dtype=q.dtype,
        decode=batch.max_q_len == 1,
        has_sinks=head_params.sinks is not None,
        has_alibi=head_params.alibi_slopes is not None,
        tree_words=0 if batch.tree_mask is None else batch.tree_mask.shape[1],
        reads_e4m3b11=chip.reads_e4m3b11,
    )
    config = with_kv_pages(config, sizes.kv_pages)
    return config if block_sizes else shrink_to_fit(config, chip)


def default_block_sizes(q: Array, pages: KVPages, batch: RaggedBatch, chip: Chip) -> BlockSizes:
    """Those that a search found for the shape on this chip, else by the heuristic."""
    decode, q_per_kv = batch.max_q_len == 1, q.shape[1] // pages.num_kv_heads
    itemsize = q.dtype.itemsize if pages.layout.is_quantised else max(q.dtype.itemsize, pages.data.dtype.itemsize)
    shape = Shape(
        mode="decode" if decode else "prefill",
        q_per_kv=q_per_kv,
        kv_heads=pages.num_kv_heads,
        head_dim=pages.head_dim,
        page_size=pages.page_size,
        kv_dtype=pages.dtype.name,
    )
    return lookup(chip.name, shape) or preferred_block_sizes(
        kv_heads=pages.num_kv_heads, q_per_kv=q_per_kv, page_size=pages.page_size, itemsize=itemsize, decode=decode
    )


def _check_supported(q: Array, pages: KVPages) -> None:
    for name, dtype in (("q", q.dtype.name), ("pages", pages.layout.dtype)):
        quantised = name == "pages" and pages.layout.is_quantised
        if dtype not in KERNEL_DTYPES and not quantised:
            raise NotImplementedError(
                f"{name} has dtype {dtype}; the TPU kernel has float32 and bfloat16: cast it, or use backend='xla'"
            )
