"""The order of query and output rows in HBM, so that a block is one contiguous copy and a head's rows one matrix."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from paged_kernels._src.attention.tpu.config import Config
from paged_kernels._src.attention.tpu.softmax import LOG2_E
from paged_kernels._src.tpu.registers import LANES, round_up


def arrange_q(
    q: Float[Array, "tokens q_heads head_dim"], config: Config
) -> Float[Array, "operands parts rows q_lanes"]:
    """The left operands; within a part, row `g * operand_tokens + r` is its query head `g` of token row `r`."""
    c = config
    q = jnp.pad(q, ((0, c.q_blocks * c.q_rows - c.tokens), (0, 0), (0, 0)))
    q = q.reshape(-1, c.operand_tokens, c.parts * c.part_heads, c.layout.k_dim).swapaxes(1, 2)
    q = q.reshape(-1, c.parts, c.part_heads * c.operand_tokens, c.layout.k_dim)
    q = jnp.pad(
        q, ((0, 0), (0, 0), (0, c.part_rows - c.part_heads * c.operand_tokens), (0, c.q_lanes - c.layout.k_dim))
    )
    return q.astype(c.compute_dtype)


def restore_rows(
    operands: Float[Array, "operands parts rows *features"], config: Config
) -> Float[Array, "tokens q_heads *features"]:
    """The inverse of `arrange_q`, for an output with any (or no) trailing axis."""
    c = config
    features = operands.shape[3:]
    rows = operands[:, :, : c.part_heads * c.operand_tokens]
    rows = rows.reshape(-1, c.parts * c.part_heads, c.operand_tokens, *features).swapaxes(1, 2)
    return rows.reshape(c.q_blocks * c.q_rows, c.parts * c.part_heads, *features)[: c.tokens]


def restore_output(
    operands: Float[Array, "operands parts rows out_lanes"], config: Config
) -> Float[Array, "tokens q_heads v_head_dim"]:
    """The output rows, without the lanes that are not V's."""
    layout = config.layout
    first = layout.v_start - layout.v_lanes.start
    return restore_rows(operands[..., first : first + layout.v_dim], config)


def restore_lse(
    packed: Float[Array, "q_blocks lse_rows_over_128 128"], config: Config
) -> Float[Array, "tokens q_heads"]:
    """The log-sum-exp rows, from `softmax.pack_lanes` of each block."""
    c = config
    flat = packed.reshape(c.q_blocks, -1)[:, : c.operands * c.parts * c.part_rows]
    return restore_rows(flat.reshape(-1, c.parts, c.part_rows), c)


def arrange_page_table(
    page_table: Int32[Array, "seqs pages_per_seq"], num_pages: int, config: Config
) -> Int32[Array, "seqs 1 table_ids"]:
    """The page table in HBM, each sequence's ids in a row of their own, so that a copy may start at any 128th.

    The rows are long enough that a copy of `config.ids_per_copy` never reaches past the end, and every id is that of a page:
    the kernel checks no bounds.
    """
    table_ids = round_up(config.pages_per_seq, LANES) + config.ids_per_copy - LANES
    padded = jnp.pad(jnp.clip(page_table, 0, num_pages - 1), ((0, 0), (0, table_ids - config.pages_per_seq)))
    return padded[:, None]


def arrange_tree(
    tree_mask: Int32[Array, "tokens words"], config: Config
) -> Int32[Array, "operands operand_tokens tree_lanes"]:
    """The words of each row of an operand, one a lane."""
    c = config
    padding = ((0, c.q_blocks * c.q_rows - c.tokens), (0, c.tree_lanes - c.tree_words))
    return jnp.pad(tree_mask, padding).reshape(-1, c.operand_tokens, c.tree_lanes)


def arrange_heads(of_heads: Float[Array, " q_heads"], config: Config) -> Float[Array, "parts head_rows 128"]:
    """What each query head adds to its logits to base 2, repeated along lanes."""
    c = config
    values = (of_heads.astype(jnp.float32) * LOG2_E).reshape(c.parts, c.part_heads, 1)
    values = jnp.pad(values, ((0, 0), (0, c.head_rows - c.part_heads), (0, 0)))
    return jnp.broadcast_to(values, (*values.shape[:2], LANES))
