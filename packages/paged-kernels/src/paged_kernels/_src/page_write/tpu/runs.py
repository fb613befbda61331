"""The plan of a page write: runs of rows that go side by side into one span of slots, as integers."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Runs:
    """The pieces of a page write, each within one span of slots, which the kernel reads and writes as a whole.

    Run `i` stores rows `row[i] : row[i] + length[i]` in slots `slot[i] : slot[i] + length[i]` of page `page[i]`:

        page 7, spans of 4 slots |. . . .|. a b c|d . . .|. . . .|    rows a-c are one run, row d the next

    No two runs touch the same span, because no two sequences write the same page.
    """

    count: Int32[Array, " 1"]
    """How many of the entries below are in use; those after mean nothing."""
    page: Int32[Array, " runs"]
    slot: Int32[Array, " runs"]
    row: Int32[Array, " runs"]
    length: Int32[Array, " runs"]
    """Rows of each run, at most a span."""


def max_runs(tokens: int, seqs: int, span: int) -> int:
    """The most runs that `tokens` rows of `seqs` sequences can make: each sequence adds two that are not full."""
    return min(tokens, tokens // span + 2 * seqs)


def list_runs(page_ids: Int32[Array, " tokens"], slots: Int32[Array, " tokens"], *, span: int, size: int) -> Runs:
    """The runs of rows whose places are these (`row_slots`); page 0 means that a row goes nowhere.

    Args:
        page_ids: the page of each row.
        slots: the slot of each row in its page.
        span: slots that a run may not cross a multiple of; divides the page size.
        size: entries to make, at least as many as there are runs (`max_runs`).
    """
    starts = _run_starts(page_ids, slots, span)
    tokens = page_ids.shape[0]
    row = jnp.nonzero(starts, size=size, fill_value=0)[0].astype(jnp.int32)
    # A run ends before the next row that starts one or goes nowhere.
    index = jnp.arange(tokens, dtype=jnp.int32)
    stops = jnp.where(starts | (page_ids == 0), index, tokens)
    next_stop = jnp.append(jax.lax.cummin(stops, reverse=True), tokens)[row + 1]
    return Runs(
        count=jnp.sum(starts, dtype=jnp.int32)[None],
        page=page_ids[row],
        slot=slots[row],
        row=row,
        length=next_stop.astype(jnp.int32) - row,
    )


def _run_starts(page_ids: Int32[Array, " tokens"], slots: Int32[Array, " tokens"], span: int) -> Bool[Array, " tokens"]:
    before = jnp.roll(page_ids, 1).at[0].set(0)
    continues = (before == page_ids) & (jnp.roll(slots, 1) + 1 == slots) & (slots % span != 0)
    return (page_ids > 0) & ~continues
