"""What the kernel does with one run, of the rows and of their scales: its copies, and the merge between them."""

import dataclasses
from typing import Any, ClassVar

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from paged_kernels._src.page_write.tpu.merge import merge_lanes, merge_rows
from paged_kernels._src.page_write.tpu.runs import Runs
from paged_kernels._src.tpu.registers import LANES, register_rows

UNROLLED_ROWS = 256
"""New rows, of some KV heads, that are merged as one piece of straight code; those of one head alone would wait."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Buffers:
    """The kernel's VMEM and semaphores for one array; run `i` has buffer `i % depth` of each kind to itself."""

    spans: Any  # [depth, ...]
    strips: Any  # [depth, ...]
    span_read: Any  # [depth]
    strip_read: Any  # [depth]
    span_written: Any  # [depth]


@dataclasses.dataclass(frozen=True)
class RunCopies:
    """The three copies of each run: its span of slots in, a strip of the new rows in, and the span out."""

    runs: Runs  # SMEM
    new: Any  # HBM, what is new of every token, whole units, and at least one strip
    pages: Any  # HBM
    buffers: Buffers
    _: dataclasses.KW_ONLY
    span: int
    page_size: int
    token_axis: ClassVar[int]
    """The axis of `new` that tokens lie along."""

    def start_read(self, run):
        """Fetches what is new, and the span unless all of it is new."""
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

    def merge(self, run):
        """Puts what is new among what the span holds."""
        raise NotImplementedError

    def buffer(self, run):
        """The buffer that is the run's, once run `run - depth` is written."""
        return run % self.buffers.spans.shape[0]

    @property
    def strip(self) -> int:
        """Tokens in a strip."""
        return self.buffers.strips.shape[1 + self.token_axis]

    @property
    def unit(self) -> int:
        """Tokens that fill a register: strips start at a multiple of it."""
        raise NotImplementedError

    def strip_start(self, run):
        """The first token of the aligned strip that holds the run's; no strip goes past the end of `new`."""
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
    """The rows: `new` [kv_heads, rows, lanes], `pages` [pages, kv_heads, page_size, lanes], a span some of a page."""

    token_axis = 1

    @property
    def unit(self) -> int:
        """Rows of a register."""
        return register_rows(self.new.dtype)

    def merge(self, run):
        """Puts the run's rows among the slots of its span, some KV heads at once."""
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
    """The scales: `new` [kinds, kv_heads, tokens], `pages` [pages, kv_heads, 1, scale_lanes], a span all of a page's.

    No two runs may be of one page, since each brings back the scales of the whole page.
    """

    token_axis = 2

    @property
    def unit(self) -> int:
        """Tokens of a register."""
        return LANES

    def merge(self, run):
        """Puts the scales of the run's rows among those of its page, of all KV heads at once."""
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
        return self.runs.length[run] > 0  # each run: its page has other kinds, slots and lanes of padding

    def _place(self, run):
        return self.pages.at[self.runs.page[run], :, 0]
