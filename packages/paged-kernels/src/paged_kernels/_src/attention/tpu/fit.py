"""The static choices for a call: which kernels are launched, and with what sizes."""

import dataclasses

import jax

from paged_kernels._src.attention.block_sizes import BlockSizes
from paged_kernels._src.attention.tpu.config import Config
from paged_kernels._src.attention.tpu.enlarge_pages import enlarge, native_page_size
from paged_kernels._src.attention.tpu.schedule import max_tiles
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
from paged_kernels._src.call import AttentionCall
from paged_kernels._src.kv_pages import KVPages
from paged_kernels._src.tpu.chip import Chip, chip_in_scope
from paged_kernels._src.tpu.registers import KERNEL_DTYPES
from paged_kernels._src.tpu.tuning.lookup import Shape, lookup


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """The static facts of an attention: one kernel, or two if single-row sequences have their own."""

    main: Config
    """The kernel for all sequences, or for all but the single-row sequences."""
    singles: Config | None
    """The decode kernel for the single-row sequences of a mixed batch, or None."""
    num_pages: int
    """The number of pages that the kernels see."""
    pages_joined: int
    """The number of pages joined into one that the kernels can copy; 1 if none are joined."""
    vmem_bytes: int
    """Vector memory that a kernel may use, in bytes."""


def fit(call: AttentionCall, block_sizes: BlockSizes | None) -> LaunchConfig:
    """Returns the kernels for these shapes on the chip in scope.

    Raises:
        NotImplementedError: the kernel does not have the types, or the sizes do not fit the chip's memories.
    """
    _check_dtypes(call.q, call.pages)
    chip = chip_in_scope()
    pages_joined = native_page_size(call.pages) // call.pages.page_size
    if pages_joined > 1:
        pages, batch = jax.eval_shape(enlarge, call.pages, call.batch)
        call = dataclasses.replace(call, pages=pages, batch=batch)
    main = make_config(call, block_sizes=block_sizes, chip=chip)
    return LaunchConfig(
        main=main,
        singles=make_config(of_singles(call), block_sizes=None, chip=chip) if takes_singles(main, call) else None,
        num_pages=call.pages.num_pages,
        pages_joined=pages_joined,
        vmem_bytes=chip.vmem_bytes,
    )


def takes_singles(main: Config, call: AttentionCall) -> bool:
    """True if single-row sequences get a kernel of their own, beside this one.

    In a small block a single row costs no more. A batch of one sequence is assumed to be a prefill.
    """
    return main.q_rows > MIN_Q_ROWS and not main.decode and call.batch.max_seqs > 1


def of_singles(call: AttentionCall) -> AttentionCall:
    """Returns the call for the single-row sequences."""
    batch = jax.eval_shape(lambda batch: take_singles(batch, call.q.shape[0])[1], call.batch)
    q = jax.ShapeDtypeStruct((batch.max_seqs, *call.q.shape[1:]), call.q.dtype)
    return dataclasses.replace(call, q=q, batch=batch)


def make_config(call: AttentionCall, *, block_sizes: BlockSizes | None, chip: Chip) -> Config:
    """Returns the static facts of one kernel."""
    pages, batch, head_params = call.pages, call.batch, call.head_params
    tokens, q_heads, _ = call.q.shape
    sizes = block_sizes or default_block_sizes(call, chip)
    config = Config(
        spec=call.spec,
        tokens=tokens,
        kv_heads=pages.num_kv_heads,
        q_per_kv=q_heads // pages.num_kv_heads,
        layout=pages.layout,
        page_size=pages.page_size,
        pages_per_seq=batch.pages_per_seq,
        q_rows=q_rows_for(tokens, batch.max_q_len, sizes.q_rows),
        kv_pages=1,
        subblock_pages=1,
        buffers=BUFFERS,
        q_dtype=call.q.dtype,
        decode=batch.max_q_len == 1,
        has_sinks=head_params.sinks is not None,
        has_alibi=head_params.alibi_slopes is not None,
        tree_words=0 if batch.tree_mask is None else batch.tree_mask.shape[1],
        reads_e4m3b11=chip.reads_e4m3b11,
    )
    config = with_kv_pages(config, sizes.kv_pages)
    config = config if block_sizes else shrink_to_fit(config, chip)
    check_fits(config, chip, max_tiles(tokens, batch.max_seqs, config.q_rows) + 1)
    return config


def default_block_sizes(call: AttentionCall, chip: Chip) -> BlockSizes:
    """Returns the tuned block sizes for the shape on this chip, or else the preferred ones."""
    q, pages = call.q, call.pages
    decode, q_per_kv = call.batch.max_q_len == 1, q.shape[1] // pages.num_kv_heads
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


def _check_dtypes(q: jax.ShapeDtypeStruct, pages: KVPages) -> None:
    for name, dtype in (("q", q.dtype.name), ("pages", pages.layout.dtype)):
        quantised = name == "pages" and pages.layout.is_quantised
        if dtype not in KERNEL_DTYPES and not quantised:
            raise NotImplementedError(
                f"{name} has dtype {dtype}; the TPU kernel has float32 and bfloat16: cast it, or use backend='xla'"
            )
