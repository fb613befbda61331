"""The product of rows with the matrix of their expert: each row is multiplied by one matrix, not by all."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

_FEWEST_ROWS, _MOST_ROWS = 8, 128


def expert_dot(
    x: Float[Array, "rows n_in"], matrices: Float[Array, "experts n_in n_out"], sizes: Int32[Array, "*experts"]
) -> Float[Array, "rows n_out"]:
    """Each row times the matrix of its expert; rows past the sum of `sizes` give rows that mean nothing.

    On TPUs it is `jax.lax.ragged_dot`, which compiles to a kernel there. Elsewhere that multiplies all rows by all
    matrices, so the rows are multiplied in blocks of one expert each.

    Args:
        x: rows, those of expert 0 first, then those of expert 1, and so on.
        matrices: of each expert.
        sizes: rows of each expert.
    """
    return jax.lax.platform_dependent(x, matrices, sizes, tpu=jax.lax.ragged_dot, default=_dot_by_blocks)


class Blocks(NamedTuple):
    """Rows cut into blocks that are of one expert each, in order."""

    count: Int32[Array, ""]
    """How many blocks there are; entries past it mean nothing."""
    experts: Int32[Array, "*most"]
    """The expert of each block."""
    starts: Int32[Array, "*most"]
    """The first row of each block; it ends at the next one's start, or the end of its expert's rows."""


def blocks_of(sizes: Int32[Array, "*experts"], rows: int, block_rows: int) -> Blocks:
    """Cuts each expert's rows into blocks of at most `block_rows`; an expert without rows has none.

    >>> blocks = blocks_of(jnp.array([3, 0, 5], jnp.int32), rows=8, block_rows=4)
    >>> int(blocks.count), blocks.experts[:3].tolist(), blocks.starts[:3].tolist()
    (3, [0, 2, 2], [0, 3, 7])
    """
    most = rows // block_rows + min(len(sizes), rows)
    ends = jnp.cumsum(-(-sizes // block_rows))  # blocks up to the last of each expert
    index = jnp.arange(most, dtype=jnp.int32)
    experts = jnp.minimum(jnp.searchsorted(ends, index, side="right"), len(sizes) - 1).astype(jnp.int32)
    first_block = ends - -(-sizes // block_rows)
    first_row = jnp.cumsum(sizes) - sizes
    starts = first_row[experts] + (index - first_block[experts]) * block_rows
    return Blocks(ends[-1], experts, starts)


def _dot_by_blocks(x: Array, matrices: Array, sizes: Array) -> Array:
    rows, out_size = x.shape[0], matrices.shape[2]
    block_rows = _block_rows(rows, len(sizes))
    blocks = blocks_of(sizes, rows, block_rows)
    padded = jnp.pad(x, ((0, block_rows), (0, 0)))

    def multiply(index: Array, out: Array) -> Array:
        # A block has rows of the next experts behind its own. Their products are overwritten by the blocks after it.
        start, matrix = blocks.starts[index], matrices[blocks.experts[index]]
        block = jax.lax.dynamic_slice_in_dim(padded, start, block_rows)
        return jax.lax.dynamic_update_slice_in_dim(out, block @ matrix, start, axis=0)

    out = jnp.zeros((rows + block_rows, out_size), jnp.result_type(x, matrices))
    return jax.lax.fori_loop(0, blocks.count, multiply, out)[:rows]


def _block_rows(rows: int, experts: int) -> int:
    """The mean number of an expert's rows, as a power of two within bounds."""
    mean = max(1, rows // experts)
    return min(_MOST_ROWS, max(_FEWEST_ROWS, 1 << (mean - 1).bit_length()))
