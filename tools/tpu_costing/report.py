"""Writes results as a table, a JSON file and a plot."""

import dataclasses
import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tpu_costing.calls import CONTESTANTS
from tpu_costing.chips import versions
from tpu_costing.measure import Result

_PLOT_TICKS = (0.2, 0.5, 1, 2, 5, 10, 20)
_COLUMNS = "{:<40} {:<6} {:<10} {:>9} {:>10} {:>8} {:>9} {:>7} {:>9} {:>7} {:>7} {:>8} {:>6}"
HEADER = _COLUMNS.format(
    "workload",
    "chip",
    "kernel",
    "blocks",
    "cycles",
    "a token",
    "limit",
    "/limit",
    "bundles",
    "DMAs",
    "spills",
    "VMEM KiB",
    "ours/",
)


def geometric_mean(ratios: Iterable[float]) -> float:
    """Returns the geometric mean: 2 and 1/2 have the mean 1.

    >>> geometric_mean([2.0, 0.5])
    1.0

    Raises:
        ValueError: `ratios` is empty.
    """
    logs = [math.log(ratio) for ratio in ratios]
    if not logs:
        raise ValueError("ratios must have at least one entry")
    return math.exp(sum(logs) / len(logs))


def best_of(results: list[Result]) -> Result:
    """Returns the cheapest result with figures. If none has figures, returns the first."""
    return min(results, key=lambda result: (result.failure is not None, result.figures.cycles))


def best_by_kernel(results: list[Result]) -> list[Result]:
    """Returns the best result of each kernel, of results of one workload and chip."""
    kernels = dict.fromkeys(result.kernel for result in results)
    return [best_of([result for result in results if result.kernel == kernel]) for kernel in kernels]


def ratio_to_peers(results: list[Result]) -> float | None:
    """Returns our cycles over the best peer's. None if one side has no figures."""
    ours = [result for result in results if result.kernel == "ours" and result.failure is None]
    peers = [result for result in results if result.kernel != "ours" and result.failure is None]
    if not ours or not peers:
        return None
    return ours[0].cycles / min(peer.cycles for peer in peers)


def line(result: Result, ours: Result | None = None) -> str:
    """Returns a result's line of the table. With `ours`, the line ends with our cycles over the result's."""
    head = (result.workload, result.chip, result.kernel, result.blocks)
    if result.failure is not None:
        return "{:<40} {:<6} {:<10} {:>9}  fails: ".format(*head) + result.failure
    f = result.figures
    over = f"{ours.cycles / result.cycles:.2f}" if ours and ours.failure is None and ours is not result else ""
    return _COLUMNS.format(
        *head,
        f"{f.cycles:.1f}",
        f"{f.cycles / result.tokens:.2f}",
        f"{result.limit:.1f}",
        f"{result.ratio:.2f}",
        f"{f.bundles:.1f}",
        f"{f.dmas:.2f}",
        f"{f.vector_spills:.1f}",
        "-" if result.vmem_bytes is None else result.vmem_bytes // 1024,
        over,
    ).rstrip()


def account(result: Result) -> str:
    """Returns two lines: the cycles of the critical path by kind, and the operations by kind, both per unit."""

    def listed(counts: dict[str, float]) -> str:
        most_first = sorted(counts.items(), key=lambda item: -item[1])
        return ", ".join(f"{kind} {count:.1f}" for kind, count in most_first if abs(count) >= 0.05)

    return f"    critical path: {listed(result.figures.path)}\n    operations: {listed(result.figures.operations)}"


def last_line(groups: list[list[Result]]) -> str:
    """Returns the last line of the table: the geometric mean of `ratio_to_peers`."""
    ratios = [ratio for group in groups if (ratio := ratio_to_peers(group)) is not None]
    if not ratios:
        return "no workload in which both our kernel and a kernel of jax compile"
    return (
        f"geometric mean of ours / jax's better kernel, max(cycles, limit), over {len(ratios)} of {len(groups)}: "
        f"{geometric_mean(ratios):.3f}"
    )


def markdown(groups: list[list[Result]]) -> str:
    """Returns a table in Markdown: a line for each workload and chip, a column for each kernel."""
    peers = [kernel for kernel in CONTESTANTS if any(r.kernel == kernel for group in groups for r in group)][1:]
    columns = ["workload", "chip", "ours", "limit", "bundles", "spills", *peers, *(["ours / better"] if peers else [])]
    lines = [columns, ["---"] * len(columns), *(_markdown_cells(group, peers) for group in groups)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _markdown_cells(group: list[Result], peers: list[str]) -> list[str]:
    best = {result.kernel: result for result in best_by_kernel(group)}
    ours = best["ours"]
    figures = ours.figures
    counts = ["–", "–"] if ours.failure else [f"{figures.bundles:.0f}", f"{figures.vector_spills:.1f}"]
    ratio = ratio_to_peers(group)
    others = [
        best[kernel].failure or f"{best[kernel].figures.cycles:.0f}" if kernel in best else "–" for kernel in peers
    ]
    last = [] if not peers else ["–" if ratio is None else f"{ratio:.2f}"]
    ours_cycles = ours.failure or f"{figures.cycles:.0f}"
    return [f"`{ours.workload}`", ours.chip, ours_cycles, f"{ours.limit:.0f}", *counts, *others, *last]


def write_json(path: Path, groups: list[list[Result]]) -> None:
    """Write all results, with versions and date."""
    about = versions()
    entries = [{**dataclasses.asdict(result), "counts": result.cycles} for group in groups for result in group]
    path.write_text(
        json.dumps({"estimated": True, **about, "date": time.strftime("%Y-%m-%d"), "results": entries}, indent=1) + "\n"
    )


def plot(path: Path, groups: list[list[Result]]) -> None:
    """Draw estimated cycles over the limit: a panel per chip, a line per workload, a dot per kernel."""
    import matplotlib as mpl  # noqa: PLC0415 -- only for the plot

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    chips, workloads = (
        list(dict.fromkeys(getattr(group[0], name) for group in groups)) for name in ("chip", "workload")
    )
    size = (3 + 4 * len(chips), 1.2 + 0.2 * len(workloads))
    figure, panels = plt.subplots(1, len(chips), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for panel, chip in zip(panels[0], chips, strict=True):
        results = [result for group in groups if group[0].chip == chip for result in best_by_kernel(group)]
        _plot_chip(panel, chip, [result for result in results if result.failure is None], workloads)
    panels[0, 0].set_yticks(range(len(workloads)), workloads, fontsize=7)
    panels[0, 0].invert_yaxis()
    panels[0, 0].legend(loc="upper right", fontsize=7)
    figure.supxlabel(
        "estimated cycles / limit of HBM (decode, write) or of the matrix units (prefill, mixed)", fontsize=8
    )
    figure.savefig(path, dpi=130)


def _plot_chip(panel: Any, chip: str, results: list[Result], workloads: list[str]) -> None:  # Any: matplotlib's Axes
    for kernel, style in {"ours": "o", "jax paged": "s", "jax ragged": "D"}.items():
        of_kernel = [result for result in results if result.kernel == kernel]
        ratios = [result.figures.cycles / result.limit for result in of_kernel]
        lines = [workloads.index(result.workload) for result in of_kernel]
        if of_kernel:
            panel.plot(ratios, lines, style, markersize=4, label=kernel)
    panel.axvline(1.0, color="black", linewidth=1)
    panel.set_xscale("log")
    panel.set_xticks(_PLOT_TICKS, [f"{tick:g}" for tick in _PLOT_TICKS], fontsize=7)
    panel.minorticks_off()
    panel.set_title(chip, fontsize=9)
    panel.grid(axis="both", linewidth=0.3)
