"""Calls the kernels with a layer's arrays and a prepared step, and restores the order of the output."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from paged_kernels._src.attention.tpu import arrange
from paged_kernels._src.attention.tpu.config import Config
from paged_kernels._src.attention.tpu.decode import decode_kernel
from paged_kernels._src.attention.tpu.enlarge_pages import enlarge_pages
from paged_kernels._src.attention.tpu.fit import LaunchConfig
from paged_kernels._src.attention.tpu.kernel import attention_kernel
from paged_kernels._src.attention.tpu.memory import KernelInputs, Scratch
from paged_kernels._src.attention.tpu.prepare import AttentionWork, KernelWork
from paged_kernels._src.head_params import HeadParams
from paged_kernels._src.kv_pages import KVPages
from paged_kernels._src.tpu.interpreter import Interpret
from paged_kernels._src.tpu.registers import LANES


def attend(
    q: Float[Array, "tokens q_heads head_dim"],
    pages: KVPages,
    work: AttentionWork,
    head_params: HeadParams,
    *,
    config: LaunchConfig,
    interpret: Interpret,
    return_lse: bool,
) -> tuple[Float[Array, "tokens q_heads v_head_dim"], Float[Array, "tokens q_heads"] | None]:
    """Returns the output in `q.dtype`, and each row's log-sum-exp (natural log, float32; -inf if it is not a token).

    Args:
        q: the queries, float32 or bfloat16.
        pages: keys and values, float32, bfloat16 or a type with scales.
        work: what the kernels need from the batch, from `prepare`.
        head_params: sinks and ALiBi slopes.
        config: the kernels, from `fit`.
        interpret: the parameters of Pallas's TPU interpreter; `False` compiles.
        return_lse: True to compute the log-sum-exp; otherwise it is `None`.
    """
    if work.joined_ids is not None:
        pages = enlarge_pages(pages, work.joined_ids)

    def launch(q, kernel: KernelWork, c: Config):
        c = dataclasses.replace(c, has_lse=return_lse)
        with jax.enable_x64(False):  # the hardware has no 64-bit integers, so loops must not count in them
            inputs = KernelInputs.arranged(q, pages, kernel, head_params, c)
            return _call_kernel(inputs, kernel, c, vmem_bytes=config.vmem_bytes, interpret=interpret)

    if config.singles is None or work.singles is None:
        return launch(q, work.main, config.main)
    rows = work.single_rows
    of_singles = launch(q.at[rows].get(mode="clip"), work.singles, config.singles)
    of_others = launch(q, work.main, config.main)
    return jax.tree.map(lambda all_rows, x: all_rows.at[rows].set(x, mode="drop"), of_others, of_singles)


def _call_kernel(inputs: KernelInputs, kernel: KernelWork, c: Config, *, vmem_bytes: int, interpret: Interpret):
    work = (kernel.tiles, kernel.page_block_starts) if c.decode else (kernel.tiles,)
    out, lse = pl.pallas_call(
        functools.partial(decode_kernel if c.decode else attention_kernel, config=c),
        in_specs=(*jax.tree.map(lambda _: pl.BlockSpec(memory_space=pltpu.SMEM), work), inputs.specs()),
        out_specs=(pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pl.ANY) if c.has_lse else None),
        out_shape=(
            jax.ShapeDtypeStruct((c.q_blocks * c.operands, c.parts, c.part_rows, c.out_lanes), c.q_dtype),
            jax.ShapeDtypeStruct((c.q_blocks, c.lse_rows // LANES, LANES), jnp.float32) if c.has_lse else None,
        ),
        scratch_shapes=(Scratch.shapes(c),),  # pyright: ignore[reportArgumentType] -- any pytree will do
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True, vmem_limit_bytes=vmem_bytes),
        interpret=interpret,
        name="paged_attention",
    )(*work, inputs)
    return arrange.restore_output(out, c), arrange.restore_lse(lse, c) if c.has_lse else None
