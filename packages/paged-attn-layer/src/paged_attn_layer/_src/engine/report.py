"""A report of an engine's run for people: a summary as text, and a picture."""

import os
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

from paged_attn_layer._src.engine.completion import Completion
from paged_attn_layer._src.engine.progress import optional_module
from paged_attn_layer._src.engine.stats import EngineStats

PREFILL_COLOUR = "#e08e45"
DECODE_COLOUR = "#3b7a9e"
PAGES_COLOUR = "#5b8c5a"


def summary(prompts: Sequence[str], completions: Sequence[Completion], stats: EngineStats) -> str:
    """Returns a table of prompts and answers, then the figures of the run.

    Prompts are shortened. Answers are whole, and wrapped to the terminal's width.

    Args:
        prompts: the prompts.
        completions: their answers, in the same order.
        stats: the engine's statistics.
    """
    return "\n".join([*_answers(prompts, completions), "", *_figures(stats)])


def plot(stats: EngineStats, num_pages: int, path: str | os.PathLike[str]) -> None:
    """Draw the pages in use and the tokens computed in each step into an image file.

    Args:
        stats: the engine's statistics.
        num_pages: the number of pages that the engine can allocate.
        path: the image file. Its ending chooses the format.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = optional_module("matplotlib.figure").Figure(figsize=(10, 6), dpi=144, layout="constrained")
    pages, tokens = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    number = range(len(stats.steps))
    figure.suptitle("Continuous batching over a paged KV cache", fontsize=13, fontweight="bold")
    _draw_pages(pages, number, [step.pages_used for step in stats.steps], num_pages)
    _draw_tokens(tokens, number, stats)
    for axes in (pages, tokens):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.set_axisbelow(True)
        axes.margins(x=0)
    figure.savefig(path)


def _draw_pages(axes: Any, number: range, used: list[int], num_pages: int) -> None:
    axes.fill_between(number, used, step="mid", color=PAGES_COLOUR, alpha=0.3)
    axes.step(number, used, where="mid", color=PAGES_COLOUR, linewidth=1.5)
    axes.set_ylabel("pages in use")
    axes.set_ylim(bottom=0, top=1.15 * max(used, default=1))
    axes.set_title(f"most at once: {max(used, default=0)} of {num_pages} pages", loc="right", fontsize=9, color="0.4")


def _draw_tokens(axes: Any, number: range, stats: EngineStats) -> None:
    prefill = [step.prefill_tokens for step in stats.steps]
    decode = [step.decode_tokens for step in stats.steps]
    axes.bar(number, decode, width=1.0, color=DECODE_COLOUR, label="decode (answers)")
    axes.bar(number, prefill, width=1.0, bottom=decode, color=PREFILL_COLOUR, label="prefill (prompts)")
    axes.set_xlabel("step")
    axes.set_ylabel("tokens computed")
    axes.legend(frameon=False, loc="upper right")


def _answers(prompts: Sequence[str], completions: Sequence[Completion]) -> list[str]:
    width = max(60, shutil.get_terminal_size((120, 24)).columns)
    prompt_width = (width - 20) // 3
    margin = prompt_width + 19  # the three columns before the answer, and the spaces between them
    lines = [f"{'#':>3}  {'tokens':>10}  {'prompt':<{prompt_width}}  answer"]
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True), 1):
        sizes = f"{completion.prompt_tokens:>4} + {len(completion.token_ids):>3}"
        ended = "" if completion.finish_reason == "stop" else " …"
        first, *rest = textwrap.wrap(completion.text + ended, width - margin) or [""]
        lines.append(f"{number:>3}  {sizes:>10}  {_shorten(prompt, prompt_width):<{prompt_width}}  {first}".rstrip())
        lines += [" " * margin + line for line in rest]
    return lines


def _shorten(text: str, width: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def _figures(stats: EngineStats) -> list[str]:
    modes = ", ".join(f"{count} {mode}" for mode, count in stats.steps_by_mode.items())
    rows = [
        ("prefill", f"{stats.prefill_rate:,.1f} tokens/s", f"{stats.prefill_tokens:,} tokens"),
        ("prefix", f"{stats.cached_tokens:,} tokens", "found in cached pages, not computed"),
        ("decode", f"{stats.decode_rate:,.1f} tokens/s", f"{stats.decode_tokens:,} tokens, all requests together"),
        ("steps", f"{len(stats.steps)}", modes),
        ("pages", f"{stats.peak_pages} at most", f"{stats.preemptions} preemptions"),
        ("host", f"{stats.host_microseconds:,.0f} µs per step", "scheduling, batch, results"),
        ("device", f"{stats.device_microseconds:,.0f} µs per step", "the compiled step, tokens to the host"),
        ("serving", f"{stats.seconds:.1f} s", f"after {stats.warm_up_seconds:.1f} s of warm-up"),
        ("compilations", f"{stats.compilations}", f"after warm-up, which compiled {stats.warm_up_compilations}"),
    ]
    name_width = max(len(name) for name, _, _ in rows)
    value_width = max(len(value) for _, value, _ in rows)
    return [f"{name:<{name_width}}  {value:>{value_width}}  {more}".rstrip() for name, value, more in rows]
