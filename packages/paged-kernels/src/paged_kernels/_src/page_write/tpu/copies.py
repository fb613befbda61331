"""What the kernel does with one run: its copies, and the merge. There is one class for rows and one for scales."""

import dataclasses
from typing import Any, ClassVar

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paged_kernels._src.page_write.tpu.merge import merge_lanes, merge_rows
from paged_kernels._src.page_write.tpu.runs import Runs
from paged_kernels._src.tpu.registers import LANES, register_rows

UNROLLED_ROWS = 256
"""The most new rows that are merged in one unrolled piece of code. Several KV heads hide each other's latency."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Buffers:
    """The kernel's VMEM and semaphores for one array. Run `i` uses buffer `i % depth` of each kind."""

    spans: Any  # [depth, ...]
    strips: Any  # [depth, ...]
    span_read: Any  # [depth]
    strip_read: Any  # [depth]
    span_written: Any  # [depth]


@dataclasses.dataclass(frozen=True)
class RunCopies:
    """The three copies of each run: its span of slots in, a strip of new rows in, and the span out."""

    runs: Runs  # SMEM
    new: Any  # HBM, new data of all tokens: a multiple of `unit`, and at least one strip
    pages: Any  # HBM
    buffers: Buffers
    _: dataclasses.KW_ONLY
    span: int
    page_size: int
    token_axis: ClassVar[int]
    """The axis of `new` along which tokens lie."""

    def start_read(self, run):
        """Start to copy the strip, and also the span unless all of it is new."""
        self._strip_read(run).start()

        @pl.when(self._keeps_some(run))
        def _():
            self._span_read(run).start()

    def wait_read(self, run):
        """Wait for the copies that `start_read` started."""
        self._strip_read(run).wait()

        @pl.when(self._keeps_some(run))
        def _():
            self._span_read(run).wait()

    def start_write(self, run):
        """Start to copy the span back."""
        self._span_write(run).start()

    def wait_write(self, run):
        """Wait until the span is back. Its buffer is then free."""
        self._span_write(run).wait()

    def merge(self, run):
        """Merge the new data into the span."""
        raise NotImplementedError

    def buffer(self, run):
        """The run's buffer. It is free once run `run - depth` is written."""
        return run % self.buffers.spans.shape[0]

    @property
    def strip(self) -> int:
        """Tokens in a strip."""
        return self.buffers.strips.shape[1 + self.token_axis]

    @property
    def unit(self) -> int:
        """Tokens that fill a register. Strips start at a multiple of it."""
        raise NotImplementedError

    def strip_start(self, run):
        """The first token of the aligned strip that holds the run. No strip reaches past the end of `new`."""
        aligned = self.runs.row[run] // self.unit * self.unit
        return pl.multiple_of(jax.numpy.minimum(aligned, self.new.shape[self.token_axis] - self.strip), self.unit)

    def _keeps_some(self, run):
        raise NotImplementedError

    def _place(self, run):
        raise NotImplementedError

    def _strip_of(self, run):
        return self.new.at[*[slice(None)] * self.token_axis, pl.ds(self.strip_start(run), self.strip)]

    def _span_read(self, run):
        at = self.buffer(run)
        return pltpu.make_async_copy(self._place(run), self.buffers.spans.at[at], self.buffers.span_read.at[at])

    def _strip_read(self, run):
        at = self.buffer(run)
        return pltpu.make_async_copy(self._strip_of(run), self.buffers.strips.at[at], self.buffers.strip_read.at[at])

    def _span_write(self, run):
        at = self.buffer(run)
        return pltpu.make_async_copy(self.buffers.spans.at[at], self._place(run), self.buffers.span_written.at[at])


class RowCopies(RunCopies):
    """The copies of rows.

    `new` is [kv_heads, rows, lanes], and `pages` is [pages, kv_heads, page_size, lanes]. A span is some slots of a
    page.
    """

    token_axis = 1

    @property
    def unit(self) -> int:
        """Rows of a register."""
        return register_rows(self.new.dtype)

    def merge(self, run):
        """Merge the run's rows into the slots of its span, several KV heads at once."""
        kv_heads = self.new.shape[0]
        buffer = self.buffer(run)
        first = self.runs.slot[run] % self.span
        end = first + self.runs.length[run]
        shift = (first - self.runs.row[run] + self.strip_start(run)) % self.strip
        most = max(1, UNROLLED_ROWS // self.strip)
        unrolled = max(n for n in range(1, min(most, kv_heads) + 1) if kv_heads % n == 0)

        def merge_heads(i, _):
            for j in range(unrolled):
                slots = self.buffers.spans.at[buffer, i * unrolled + j]
                rows = self.buffers.strips[buffer, i * unrolled + j]
                slots[...] = merge_rows(slots[...], rows, first=first, end=end, shift=shift)

        jax.lax.fori_loop(0, kv_heads // unrolled, merge_heads, None)

    def _keeps_some(self, run):
        return self.runs.length[run] < self.span

    def _place(self, run):
        slot = pl.multiple_of(self.runs.slot[run] // self.span * self.span, self.span)
        return self.pages.at[self.runs.page[run], :, pl.ds(slot, self.span)]


class ScaleCopies(RunCopies):
    """The copies of scales.

    `new` is [kinds, kv_heads, tokens], and `pages` is [pages, kv_heads, 1, scale_lanes]. A span is all scales of a
    page. So no two runs may have the same page.
    """

    token_axis = 2

    @property
    def unit(self) -> int:
        """Tokens of a register."""
        return LANES

    def merge(self, run):
        """Merge the scales of the run's rows into those of its page, all KV heads at once."""
        buffer = self.buffer(run)
        scales = self.buffers.spans[buffer]
        for kind in range(self.new.shape[0]):
            first = kind * self.page_size + self.runs.slot[run]
            scales = merge_lanes(
                scales,
                self.buffers.strips[buffer, kind],
                first=first,
                end=first + self.runs.length[run],
                shift=(first - self.runs.row[run] + self.strip_start(run)) % self.strip,
            )
        self.buffers.spans[buffer] = scales

    def _keeps_some(self, run):
        return self.runs.length[run] > 0  # every run: the page also has scales of other kinds and slots, and padding

    def _place(self, run):
        return self.pages.at[self.runs.page[run], :, 0]
