"""The kernel of the page write: for each run, a group of slots comes from HBM, takes its new rows, and goes back.

    step         0      1      2      3      4      5         with depth 4 and ahead 2
    run 0     read         merge, write      done             its buffer is free for run 4
    run 1            read         merge, write      done

Groups are disjoint, so no run waits for another; up to `depth` of them are under way.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paged_kernels.page_write.tpu.merge import merge_rows
from paged_kernels.page_write.tpu.runs import Runs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Buffers:
    """The kernel's VMEM and semaphores; run `i` has buffer `i % depth` of each kind to itself."""

    groups: Any  # [depth, kv_heads, group, K‖V]
    windows: Any  # [depth, kv_heads, window, K‖V]
    group_read: Any  # [depth]
    window_read: Any  # [depth]
    group_written: Any  # [depth]


@dataclasses.dataclass(frozen=True)
class RunCopies:
    """The three copies of each run: its group of slots in, a window of the new rows in, and the group out."""

    runs: Runs  # SMEM
    rows: Any  # HBM [kv_heads, rows, K‖V], whole tiles, and at least one window
    pages: Any  # HBM [pages, kv_heads, page_size, K‖V]
    buffers: Buffers
    row_tile: int

    def start_read(self, run):
        """Fetches the new rows, and the group unless all of it is new."""
        self._window_read(run).start()

        @pl.when(self._keeps_some(run))
        def _():
            self._group_read(run).start()

    def wait_read(self, run):
        """Waits for what `start_read` fetches."""
        self._window_read(run).wait()

        @pl.when(self._keeps_some(run))
        def _():
            self._group_read(run).wait()

    def start_write(self, run):
        """Sends the group back."""
        self._group_write(run).start()

    def wait_write(self, run):
        """Waits until the group is back, and its buffer free."""
        self._group_write(run).wait()

    def buffer(self, run):
        """The buffer that is the run's, once run `run - depth` is written."""
        return run % self.buffers.groups.shape[0]

    def window_start(self, run):
        """The first row of the aligned window that holds the run's rows; no window goes past the end of `rows`."""
        aligned = self.runs.row[run] // self.row_tile * self.row_tile
        last = self.rows.shape[1] - self.buffers.windows.shape[2]
        return pl.multiple_of(jnp.minimum(aligned, last), self.row_tile)

    def _keeps_some(self, run):
        return self.runs.length[run] < self.buffers.groups.shape[2]

    def _place(self, run):
        group = self.buffers.groups.shape[2]
        slot = pl.multiple_of(self.runs.slot[run] // group * group, group)
        return self.pages.at[self.runs.page[run], :, pl.ds(slot, group)]

    def _group_read(self, run):
        at = self.buffer(run)
        return pltpu.make_async_copy(self._place(run), self.buffers.groups.at[at], self.buffers.group_read.at[at])

    def _window_read(self, run):
        at, window = self.buffer(run), self.buffers.windows.shape[2]
        rows = self.rows.at[:, pl.ds(self.window_start(run), window)]
        return pltpu.make_async_copy(rows, self.buffers.windows.at[at], self.buffers.window_read.at[at])

    def _group_write(self, run):
        at = self.buffer(run)
        return pltpu.make_async_copy(self.buffers.groups.at[at], self._place(run), self.buffers.group_written.at[at])


def write_runs_kernel(runs: Runs, rows, pages_in, pages, buffers: Buffers, *, row_tile: int) -> None:
    """Writes the rows of each run into its slots of `pages`, which is the same memory as `pages_in`."""
    del pages_in
    copies = RunCopies(runs, rows, pages, buffers, row_tile)
    depth = buffers.groups.shape[0]
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
    """Puts the run's rows among the slots of its group, one KV head at a time."""
    _, kv_heads, group, _ = copies.buffers.groups.shape
    buffer = copies.buffer(run)
    window = copies.buffers.windows.shape[2]
    first = copies.runs.slot[run] % group
    row_in_window = copies.runs.row[run] - copies.window_start(run)

    def merge_head(head, _):
        slots = copies.buffers.groups.at[buffer, head]
        slots[...] = merge_rows(
            slots[...],
            copies.buffers.windows[buffer, head],
            first=first,
            end=first + copies.runs.length[run],
            shift=(first - row_in_window) % window,
        )

    jax.lax.fori_loop(0, kv_heads, merge_head, None)
