"""The order of query and output rows in HBM.

A block of rows is one contiguous copy, and the rows of a part are one matrix.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from paged_kernels._src.attention.tpu.config import Config
from paged_kernels._src.attention.tpu.softmax import LOG2_E
from paged_kernels._src.integers import round_up
from paged_kernels._src.tpu.registers import LANES


def arrange_q(
    q: Float[Array, "tokens q_heads head_dim"], config: Config
) -> Float[Array, "operands parts part_rows q_lanes"]:
    """Returns the left operands of the products `q . k`.

    Row `h * operand_tokens + r` of a part is query head `h` of the part, for token `r` of the operand.
    """
    c = config
    q = jnp.pad(q, ((0, c.q_blocks * c.q_rows - c.tokens), (0, 0), (0, 0)))
    q = q.reshape(-1, c.operand_tokens, c.parts * c.part_heads, c.layout.k_dim).swapaxes(1, 2)
    q = q.reshape(-1, c.parts, c.part_heads * c.operand_tokens, c.layout.k_dim)
    q = jnp.pad(
        q, ((0, 0), (0, 0), (0, c.part_rows - c.part_heads * c.operand_tokens), (0, c.q_lanes - c.layout.k_dim))
    )
    return q.astype(c.compute_dtype)


def restore_rows(
    operands: Float[Array, "operands parts part_rows *features"], config: Config
) -> Float[Array, "tokens q_heads *features"]:
    """The inverse of `arrange_q`, for an output with any trailing axes."""
    c = config
    features = operands.shape[3:]
    rows = operands[:, :, : c.part_heads * c.operand_tokens]
    rows = rows.reshape(-1, c.parts * c.part_heads, c.operand_tokens, *features).swapaxes(1, 2)
    return rows.reshape(c.q_blocks * c.q_rows, c.parts * c.part_heads, *features)[: c.tokens]


def restore_output(
    operands: Float[Array, "operands parts part_rows out_lanes"], config: Config
) -> Float[Array, "tokens q_heads v_head_dim"]:
    """Returns the output rows, without the lanes that do not belong to V."""
    layout = config.layout
    first = layout.v_start - layout.v_lanes.start
    return restore_rows(operands[..., first : first + layout.v_dim], config)


def restore_lse(
    packed: Float[Array, "q_blocks lse_rows_over_128 128"], config: Config
) -> Float[Array, "tokens q_heads"]:
    """Returns the log-sum-exp rows, from `softmax.pack_lanes` of each block."""
    c = config
    flat = packed.reshape(c.q_blocks, -1)[:, : c.operands * c.parts * c.part_rows]
    return restore_rows(flat.reshape(-1, c.parts, c.part_rows), c)


def arrange_page_table(
    page_table: Int32[Array, "seqs pages_per_seq"], num_pages: int, config: Config
) -> Int32[Array, "seqs 1 ids_per_seq"]:
    """Returns the page table in HBM, with an axis of its own for each sequence.

    A copy of page ids may start at any multiple of 128. The table is padded so that a copy of `config.ids_per_copy` ids
    never reaches past its end. Ids are clipped to existing pages, because the kernel checks no bounds.
    """
    ids_per_seq = round_up(config.pages_per_seq, LANES) + config.ids_per_copy - LANES
    padded = jnp.pad(jnp.clip(page_table, 0, num_pages - 1), ((0, 0), (0, ids_per_seq - config.pages_per_seq)))
    return padded[:, None]


def arrange_tree(
    tree_mask: Int32[Array, "tokens words"], config: Config
) -> Int32[Array, "operands operand_tokens tree_lanes"]:
    """Returns the tree mask by operand: one word per lane."""
    c = config
    padding = ((0, c.q_blocks * c.q_rows - c.tokens), (0, c.tree_lanes - c.tree_words))
    return jnp.pad(tree_mask, padding).reshape(-1, c.operand_tokens, c.tree_lanes)


def arrange_heads(per_head: Float[Array, " q_heads"], config: Config) -> Float[Array, "parts head_rows 128"]:
    """Returns one value per query head, as an addend to logits to base 2, repeated along lanes."""
    c = config
    values = (per_head.astype(jnp.float32) * LOG2_E).reshape(c.parts, c.part_heads, 1)
    values = jnp.pad(values, ((0, 0), (0, c.head_rows - c.part_heads), (0, 0)))
    return jnp.broadcast_to(values, (*values.shape[:2], LANES))
