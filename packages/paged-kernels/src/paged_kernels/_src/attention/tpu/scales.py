"""Rearranges the scales of a block's keys: from one row per page to one row per head.

The scales of a page are one row of lanes: K's for each slot, then V's. Logits and weights have their keys along lanes,
so the scales of a block must lie side by side:

    page 0  | k0 k1 v0 v1 . . . . |            K  | k0 k1 k2 k3 ...
    page 1  | k2 k3 v2 v3 . . . . |            V  | v0 v1 v2 v3 ...

All heads move together: they lie along the sublanes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from paged_kernels._src.integers import cdiv
from paged_kernels._src.tpu.registers import LANES

Load = Callable[[jax.Array | int], Float[Array, "kv_heads scale_lanes"]]
Store = Callable[[int, jax.Array | int, Float[Array, "kv_heads lanes"]], None]


def pages_per_register(page_size: int) -> int:
    """The number of pages whose keys fill a register. The buffers hold scales for a multiple of it."""
    return max(1, LANES // page_size)


def spread_scales(load: Load, store: Store, *, pages: int, page_size: int, kinds: int) -> None:
    """Put the scales of a block's pages side by side.

    Args:
        load: returns the scales of page `i`. Called for pages up to the next multiple of `pages_per_register`.
        store: takes a kind (0 for K, 1 for V), the first key of some whole registers, and their scales.
        pages: the number of pages in the block.
        page_size: a divisor or a multiple of 128.
        kinds: 2, or 1 if K and V share a scale.
    """
    at_once = pages_per_register(page_size)

    def spread_register(i, _):
        rows = [load(i * at_once + j) for j in range(at_once)]
        for kind in range(kinds):
            store(kind, pl.multiple_of(i * (at_once * page_size), LANES), _side_by_side(rows, kind, page_size))

    jax.lax.fori_loop(0, cdiv(pages, at_once), spread_register, None, unroll=min(cdiv(pages, at_once), 8))


def _side_by_side(rows: list[Array], kind: int, page_size: int) -> Float[Array, "kv_heads lanes"]:
    """Returns the scales of one kind, of pages that together fill whole registers."""
    if len(rows) == 1:
        return rows[0][:, kind * page_size : (kind + 1) * page_size]
    lane = jax.lax.broadcasted_iota(jnp.int32, rows[0].shape, 1)
    placed = rows[0]
    for j, row in enumerate(rows):
        moved = _roll(row, (j - kind) * page_size % LANES)
        placed = moved if j == 0 else jnp.where(lane >= j * page_size, moved, placed)
    return placed


def _roll(row: Array, by: int) -> Array:
    return pltpu.roll(row, by, axis=1) if by else row
