"""The runs of a page write: consecutive rows that go to consecutive slots of one span. Only integers."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Runs:
    """The runs of a page write. The kernel reads and writes the span of each run as a whole.

    Run `i` stores rows `row[i] : row[i] + length[i]` in slots `slot[i] : slot[i] + length[i]` of page `page[i]`:

        page 7, spans of 4 slots |. . . .|. a b c|d . . .|. . . .|    rows a-c are one run, row d the next

    No two runs use the same span, because no two sequences write to the same page.
    """

    count: Int32[Array, " 1"]
    """The number of runs. Entries past it are meaningless."""
    page: Int32[Array, " runs"]
    slot: Int32[Array, " runs"]
    row: Int32[Array, " runs"]
    length: Int32[Array, " runs"]
    """Rows of each run, at most a span."""


def max_runs(tokens: int, seqs: int, span: int) -> int:
    """The most runs of `tokens` rows of `seqs` sequences. Each sequence adds at most two runs that are not full."""
    return min(tokens, tokens // span + 2 * seqs)


def list_runs(page_ids: Int32[Array, " tokens"], slots: Int32[Array, " tokens"], *, span: int, size: int) -> Runs:
    """Returns the runs of rows with these pages and slots, as `row_slots` gives them.

    Args:
        page_ids: the page of each row; 0 for a row that is not stored.
        slots: the slot of each row in its page.
        span: the number of slots in a span, a divisor of the page size. No run crosses a multiple of it.
        size: the number of entries to make, at least as many as there are runs (`max_runs`).
    """
    starts = _run_starts(page_ids, slots, span)
    tokens = page_ids.shape[0]
    row = jnp.nonzero(starts, size=size, fill_value=0)[0].astype(jnp.int32)
    # A run ends before the next row that starts a run or is not stored.
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
