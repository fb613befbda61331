"""The kernel of the page write. For each run, it reads a span of slots, merges the new rows, and writes the span back.

    step         0      1      2      3      4      5         with depth 4 and ahead 2
    run 0     read         merge, write      done             its buffer is free for run 4
    run 1            read         merge, write      done

Spans are disjoint, so no run waits for another. Up to `depth` runs are in progress.
"""

import jax
from jax.experimental import pallas as pl

from paged_kernels._src.page_write.tpu.copies import Buffers, RowCopies, ScaleCopies
from paged_kernels._src.page_write.tpu.runs import Runs


def write_runs_kernel(
    runs: Runs, new: tuple, pages_in: tuple, pages: tuple, buffers: tuple[Buffers, ...], *, span: int, page_size: int
) -> None:
    """Write the rows of each run, and their scales, to their slots in `pages`.

    `pages` is the memory of `pages_in`. Each tuple holds the rows, then the scales if there are any.
    """
    del pages_in
    parts = [
        kind(runs, *refs, span=span, page_size=page_size)
        for kind, *refs in zip((RowCopies, ScaleCopies), new, pages, buffers, strict=False)
    ]
    depth = buffers[0].spans.shape[0]
    ahead = depth // 2  # runs being read; the other buffers are being written back
    count = runs.count[0]

    def step(i, _):
        merged = i - ahead

        @pl.when(i >= depth)
        def _():
            for part in parts:
                part.wait_write(i - depth)

        @pl.when(i < count)
        def _():
            for part in parts:
                part.start_read(i)

        @pl.when((merged >= 0) & (merged < count))
        def _():
            for part in parts:
                part.wait_read(merged)
                part.merge(merged)
                part.start_write(merged)

    jax.lax.fori_loop(0, count + depth, step, None)
