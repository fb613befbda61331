"""A page manager's pages over time, as a picture and as text."""

import importlib
import os
import types
from collections import Counter
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np

from paged_cache._src.manager import EventKind, PageEvent, PageManager, PageStats

COLOURS = {"used": "#3b7a9e", "cached": "#9cc3a5", "empty": "#ececec"}
MARK_COLOURS = {"stored": "#5b8c5a", "removed": "#8a8a8a", "evicted": "#c0504d"}
SWAP_COLOUR = "#e08e45"
BLOCKS = " ▁▂▃▄▅▆▇█"


class PageHistory:
    """The state of a manager's pages after each step, and the events of each step.

    Subscribe it with `manager.subscribe(history)`; otherwise it sees no events.

    >>> manager, history = PageManager(9, 2, max_seqs=4, max_sequence_length=8), PageHistory()
    >>> manager.subscribe(history)
    >>> for step in range(8):
    ...     seq = manager.admit([step] * (1 + step))
    ...     manager.commit(seq, manager.lengths(seq) - manager.computed(seq))
    ...     history.record(manager)
    ...     manager.release(seq)
    >>> print(history.text())
    used    ▁▁▂▂▃▃▄▄  4 of 8 pages, 4 at most
    cached   ▁▂▄▅▅▄▄  4
    empty   ▇▆▄▂      0
    stored   ▃▂▅▃▆▅█  20 pages
    evicted     ▂▆██  12 pages
    """

    def __init__(self) -> None:
        self.steps: list[PageStats] = []
        """The statistics after each step."""
        self.events: list[Counter[EventKind]] = []
        """The number of events of each kind in each step."""
        self._since: Counter[EventKind] = Counter()

    def __call__(self, events: list[PageEvent]) -> None:
        """Count events. The manager calls this."""
        self._since.update(event.kind for event in events)

    def record(self, manager: PageManager) -> None:
        """Record the state after a step. Call it once after each step."""
        self.steps.append(manager.stats())
        self.events.append(self._since)
        self._since = Counter()

    def text(self, width: int = 60) -> str:
        """Returns a line for each state of a page and for each kind of event, with steps from left to right.

        A full bar means all pages for a state, and the largest number of any column for an event. If there are more
        steps than columns, a column shows the mean of its steps' states and the sum of their events.

        Raises:
            ValueError: no step was recorded.
        """
        last = self._last()
        rows = [(name, _bars(pages, last.num_usable, width, np.mean)) for name, pages in self._states().items()]
        ends = [
            f"{last.num_used} of {last.num_usable} pages, {last.peak_used} at most",
            last.num_cached,
            last.num_empty,
        ]
        for name, counts in self._marks().items():
            rows.append((name, _bars(counts, None, width, np.sum)))
            ends.append(_pages(sum(counts)))
        margin = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{margin}} {bars}  {end}" for (name, bars), end in zip(rows, ends, strict=True))

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the states of pages by step into an image file, with the events below.

        Args:
            path: the image file; its ending chooses the format.

        Raises:
            ValueError: no step was recorded.
            ModuleNotFoundError: matplotlib is not installed.
        """
        last, marks = self._last(), self._marks()
        figure = _matplotlib_figure().Figure(figsize=(10, 4 + 0.45 * len(marks)), dpi=144, layout="constrained")
        figure.suptitle("Pages over time", fontsize=13, fontweight="bold")
        heights = [4, *([0.45 * len(marks)] if marks else [])]
        axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
        _draw_states(axes[0], self._states(), last)
        if marks:
            _draw_marks(axes[1], marks)
        axes[-1].set_xlabel("step")
        figure.savefig(path)

    def _last(self) -> PageStats:
        if not self.steps:
            raise ValueError("no step was recorded; call record(manager) after each step")
        return self.steps[-1]

    def _states(self) -> dict[str, list[int]]:
        return {name: [getattr(stats, f"num_{name}") for stats in self.steps] for name in COLOURS}

    def _marks(self) -> dict[str, list[int]]:
        """The number of events in each step, for each kind that happened."""
        kinds: Sequence[EventKind] = get_args(EventKind)
        counts = {kind.replace("_", " "): [events[kind] for events in self.events] for kind in kinds}
        return {name: of_kind for name, of_kind in counts.items() if any(of_kind)}


def _bars(values: Sequence[int], full: int | None, width: int, merge: Any) -> str:
    """A block for each column; full for `full` (`None`: the largest value), and never empty above 0."""
    columns = np.array([merge(part) for part in np.array_split(values, min(width, len(values)))])
    levels = np.rint(columns * (len(BLOCKS) - 1) / (full or columns.max())).astype(int)
    return "".join(BLOCKS[level] for level in np.maximum(levels, columns > 0))


def _pages(n: int) -> str:
    return f"{n:,} page{'s' * (n != 1)}"


def _matplotlib_figure() -> types.ModuleType:
    try:
        return importlib.import_module("matplotlib.figure")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a picture needs matplotlib, which is not installed; pip install 'paged-cache[plot]', or print text()",
            name=error.name,
        ) from None


def _draw_states(axes: Any, states: dict[str, list[int]], last: PageStats) -> None:
    below, edges = np.zeros(len(states["used"])), np.arange(len(states["used"]) + 1) - 0.5
    for name, pages in states.items():
        axes.stairs(below + pages, edges, baseline=below, fill=True, color=COLOURS[name], label=name)
        below = below + pages
    axes.axhline(last.peak_used, color="0.25", linewidth=1, linestyle=(0, (4, 3)), label="most used", clip_on=False)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, last.num_usable)
    axes.locator_params(axis="x", integer=True)
    axes.set_ylabel("pages")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(-0.01, 1), ncols=4, borderaxespad=0.2, fontsize=9)
    figures = f"at most {last.peak_used} of {last.num_usable} used · {last.hit_rate:.0%} of prompt tokens found"
    axes.set_title(figures, loc="right", fontsize=9, color="0.4")


def _draw_marks(axes: Any, marks: dict[str, list[int]]) -> None:
    """Draw a row of bars for each kind of event, scaled to its own largest bar."""
    for row, (name, counts) in enumerate(marks.items()):
        steps = [step for step, count in enumerate(counts) if count]
        heights = [0.8 * counts[step] / max(counts) for step in steps]
        axes.bar(steps, heights, bottom=-row - 0.4, width=1.0, color=MARK_COLOURS.get(name, SWAP_COLOUR))
        place = {"xy": (1.01, -row), "xycoords": ("axes fraction", "data"), "va": "center"}
        axes.annotate(_pages(sum(counts)), **place, fontsize=9, color="0.4")
    axes.set_yticks([-row for row in range(len(marks))], list(marks))
    axes.set_ylim(-len(marks) + 0.5, 0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
