"""The kernel of the page write: for each run, a span of slots comes from HBM, takes its new rows, and goes back.

    step         0      1      2      3      4      5         with depth 4 and ahead 2
    run 0     read         merge, write      done             its buffer is free for run 4
    run 1            read         merge, write      done

Spans are disjoint, so no run waits for another; up to `depth` of them are under way.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paged_kernels.page_write.tpu.merge import merge_rows
from paged_kernels.page_write.tpu.runs import Runs

UNROLLED_ROWS = 256
"""New rows, of some KV heads, that are merged as one piece of straight code."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Buffers:
    """The kernel's VMEM and semaphores; run `i` has buffer `i % depth` of each kind to itself."""

    spans: Any  # [depth, kv_heads, span, lanes]
    strips: Any  # [depth, kv_heads, strip, lanes]
    span_read: Any  # [depth]
    strip_read: Any  # [depth]
    span_written: Any  # [depth]


@dataclasses.dataclass(frozen=True)
class RunCopies:
    """The three copies of each run: its span of slots in, a strip of the new rows in, and the span out."""

    runs: Runs  # SMEM
    rows: Any  # HBM [kv_heads, rows, lanes], whole tiles, and at least one strip
    pages: Any  # HBM [pages, kv_heads, page_size, lanes]
    buffers: Buffers
    row_tile: int

    def start_read(self, run):
        """Fetches the new rows, and the span unless all of it is new."""
        self._strip_read(run).start()

        @pl.when(self._keeps_some(run))
        def _():
            self._span_read(run).start()

    def wait_read(self, run):
        """Waits for what `start_read` fetches."""
        self._strip_read(run).wait()

        @pl.when(self._keeps_some(run))
        def _():
            self._span_read(run).wait()

    def start_write(self, run):
        """Sends the span back."""
        self._span_write(run).start()

    def wait_write(self, run):
        """Waits until the span is back, and its buffer free."""
        self._span_write(run).wait()

    def buffer(self, run):
        """The buffer that is the run's, once run `run - depth` is written."""
        return run % self.buffers.spans.shape[0]

    def strip_start(self, run):
        """The first row of the aligned strip that holds the run's rows; no strip goes past the end of `rows`."""
        aligned = self.runs.row[run] // self.row_tile * self.row_tile
        last = self.rows.shape[1] - self.buffers.strips.shape[2]
        return pl.multiple_of(jnp.minimum(aligned, last), self.row_tile)

    def _keeps_some(self, run):
        return self.runs.length[run] < self.buffers.spans.shape[2]

    def _place(self, run):
        span = self.buffers.spans.shape[2]
        slot = pl.multiple_of(self.runs.slot[run] // span * span, span)
        return self.pages.at[self.runs.page[run], :, pl.ds(slot, span)]

    def _span_read(self, run):
        at = self.buffer(run)
        return pltpu.make_async_copy(self._place(run), self.buffers.spans.at[at], self.buffers.span_read.at[at])

    def _strip_read(self, run):
        at, strip = self.buffer(run), self.buffers.strips.shape[2]
        rows = self.rows.at[:, pl.ds(self.strip_start(run), strip)]
        return pltpu.make_async_copy(rows, self.buffers.strips.at[at], self.buffers.strip_read.at[at])

    def _span_write(self, run):
        at = self.buffer(run)
        return pltpu.make_async_copy(self.buffers.spans.at[at], self._place(run), self.buffers.span_written.at[at])


def write_runs_kernel(runs: Runs, rows, pages_in, pages, buffers: Buffers, *, row_tile: int) -> None:
    """Writes the rows of each run into its slots of `pages`, which is the same memory as `pages_in`."""
    del pages_in
    copies = RunCopies(runs, rows, pages, buffers, row_tile)
    depth = buffers.spans.shape[0]
    ahead = depth // 2  # reads under way; the rest of the buffers are on their way back
    count = runs.count[0]

    def step(i, _):
        merged = i - ahead

        @pl.when(i >= depth)
        def _():
            copies.wait_write(i - depth)

        @pl.when(i < count)
        def _():
            copies.start_read(i)

        @pl.when((merged >= 0) & (merged < count))
        def _():
            copies.wait_read(merged)
            _merge(copies, merged)
            copies.start_write(merged)

    jax.lax.fori_loop(0, count + depth, step, None)


def _merge(copies: RunCopies, run) -> None:
    """Puts the run's rows among the slots of its span, some KV heads at once: the steps of one alone would wait."""
    _, kv_heads, span, _ = copies.buffers.spans.shape
    buffer = copies.buffer(run)
    strip = copies.buffers.strips.shape[2]
    first = copies.runs.slot[run] % span
    end = first + copies.runs.length[run]
    shift = (first - copies.runs.row[run] + copies.strip_start(run)) % strip
    unrolled = max(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and n * strip <= max(strip, UNROLLED_ROWS))

    def merge_heads(i, _):
        for j in range(unrolled):
            slots = copies.buffers.spans.at[buffer, i * unrolled + j]
            new = copies.buffers.strips[buffer, i * unrolled + j]
            slots[...] = merge_rows(slots[...], new, first=first, end=end, shift=shift)

    jax.lax.fori_loop(0, kv_heads // unrolled, merge_heads, None)
