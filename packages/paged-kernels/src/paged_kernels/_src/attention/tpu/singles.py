"""Splits the single-row sequences from a mixed batch, for the decode kernel.

In a large block of query rows, a tile of one row costs as much as a tile that fills the block. A decoding sequence is
such a tile. So a batch with decoding sequences beside a prefill becomes two calls, and each skips the other's
sequences.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int32

from paged_kernels._src.batch import RaggedBatch


def take_singles(batch: RaggedBatch, tokens: int) -> tuple[Int32[Array, " seqs"], RaggedBatch, RaggedBatch]:
    """Returns the rows of the single-row sequences, those sequences as a decode batch, and the other sequences.

    The row of any other sequence is `tokens`, which is out of bounds.
    """
    starts = batch.cu_q_lens[:-1]
    is_single = batch.cu_q_lens[1:] - starts == 1
    rows = jnp.where(is_single, starts, tokens)
    singles = dataclasses.replace(
        batch,
        kv_lens=jnp.where(is_single, batch.kv_lens, 0),
        cu_q_lens=jnp.arange(batch.max_seqs + 1, dtype=jnp.int32),
        max_q_len=1,
        tree_mask=None if batch.tree_mask is None else batch.tree_mask.at[rows].get(mode="clip"),
    )
    return rows, singles, dataclasses.replace(batch, kv_lens=jnp.where(is_single, 0, batch.kv_lens))
