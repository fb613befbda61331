"""Searches the best block sizes of the TPU attention kernel, and writes them into the package's tuning data.

    python tools/tune.py --chip v6e decode-8-1-128-p16-c8192      by estimated cycles; needs libtpu, and no TPU
    python tools/tune.py --time                                   by time, on the attached TPU

Workloads have the names of `tools/tpu_cost.py`. Each stands for all calls of its shape: chip, decode or prefill, heads,
head size, page size, type. The search tries a grid: blocks of keys in powers of two and, for prefill, blocks of query
rows. An old entry of the shape is deleted first. A new entry is written if it is better than the package's default, and
records the default's cost too. --dry-run writes nothing, and compares with the present entry if there is one.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tpu_costing import timing
from tpu_costing.calls import Contestant
from tpu_costing.child_process import ChildError
from tpu_costing.chips import LIMITS, versions
from tpu_costing.measure import measure
from tpu_costing.workloads import Workload, choose

from paged_kernels._src.tpu.tuning import lookup
from paged_kernels._src.tpu.tuning.lookup import Entry, Shape

DATA = Path(lookup.__file__).parent / "data"
DECODE_KEYS = (256, 512, 1024, 2048, 4096)
PREFILL_KEYS = (128, 256, 512, 1024)
Q_ROWS = (16, 32, 64, 128, 256)
DEFAULT = Contestant(kernel="ours")
Cost = Callable[[Contestant], float | None]
"""A function that returns the cost of a choice of block sizes. None if it does not compile."""


def main() -> None:
    """Search each workload on each chip."""
    options = parse()
    chips = [timing.ask_chip()] if options.time else options.chip
    for chip in chips:
        for workload in options.workloads:
            tune(workload, chip, options)


def tune(workload: Workload, chip: str, options: argparse.Namespace) -> None:
    """Search one shape on one chip, print the result, and write it."""
    path = DATA / f"{chip}.json"
    if not options.dry_run:
        replace(path, shape_of(workload), None)
    best = search(candidates(workload), cost_by(workload, chip, options))
    print(line(workload, chip, best), flush=True)
    if best is not None and best.cost < best.default_cost and not options.dry_run:
        replace(path, shape_of(workload), entry_of(workload, best, how="timed" if options.time else "estimated"))


def parse() -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names_help = "workloads and parts of the base set (default: decode prefill)"
    parser.add_argument("names", nargs="*", metavar="WORKLOAD", help=names_help)
    parser.add_argument("--chip", nargs="+", choices=LIMITS, default=list(LIMITS), help="default: all")
    parser.add_argument("--time", action="store_true", help="measure time on the attached TPU, for its chip")
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="keep figures in this folder until sources change")
    options = parser.parse_args()
    try:
        options.workloads = tunable(choose(options.names or ["decode", "prefill"]))
    except ValueError as error:
        parser.error(str(error))
    return options


def tunable(workloads: Iterable[Workload]) -> list[Workload]:
    """Returns one workload of each shape: the longest context for decode, the most work for prefill.

    Raises:
        ValueError: a workload is not decode or prefill, or has a window.
    """
    by_shape: dict[Shape, Workload] = {}
    for workload in sorted(workloads, key=lambda w: w.context * w.new_tokens):
        if workload.mode not in {"decode", "prefill"} or workload.window is not None:
            raise ValueError(f"workload {workload.name!r} must be decode or prefill without a window to be tuned")
        by_shape[shape_of(workload)] = workload
    return list(by_shape.values())


def shape_of(workload: Workload) -> Shape:
    """Returns the shape by which the tuning data finds this workload."""
    return Shape(
        mode="decode" if workload.mode == "decode" else "prefill",
        q_per_kv=workload.q_heads // workload.kv_heads,
        kv_heads=workload.kv_heads,
        head_dim=workload.head_dim,
        page_size=workload.page_size,
        kv_dtype=workload.dtype,
    )


def candidates(workload: Workload) -> list[Contestant]:
    """Returns the grid of block sizes to try."""
    decode = workload.mode == "decode"
    tokens = workload.context + (0 if decode else workload.new_tokens)
    keys = [n for n in (DECODE_KEYS if decode else PREFILL_KEYS) if workload.page_size <= n <= tokens]
    rows = (1,) if decode else [n for n in Q_ROWS if n <= workload.new_tokens]
    return [Contestant(kernel="ours", q_rows=r, kv_pages=n // workload.page_size) for r in rows for n in keys]


def cost_by(workload: Workload, chip: str, options: argparse.Namespace) -> Cost:
    """Returns the cost function: time with --time, else estimated cycles."""

    def estimated(contestant: Contestant) -> float | None:
        result = measure(workload, chip, contestant, options.cache)
        return None if result.failure else result.figures.cycles

    def timed(contestant: Contestant) -> float | None:
        try:
            return timing.ask_microseconds(workload, contestant)
        except ChildError:
            return None

    return timed if options.time else estimated


@dataclasses.dataclass(frozen=True, kw_only=True)
class Best:
    """The result of a search: the cheapest block sizes."""

    contestant: Contestant
    cost: float
    default_cost: float
    tried: tuple[str, ...]
    """All block sizes that compiled, with their costs, to print."""


def search(contestants: list[Contestant], cost: Cost) -> Best | None:
    """Returns the cheapest of the contestants and the default. None if the default has no cost."""
    default = cost(DEFAULT)
    if default is None:
        return None
    costs = [(default, DEFAULT)]
    costs += [(found, contestant) for contestant in contestants if (found := cost(contestant)) is not None]
    least, contestant = min(costs, key=lambda pair: pair[0])
    tried = tuple(f"{contestant.blocks} {found:.1f}" for found, contestant in costs)
    return Best(contestant=contestant, cost=least, default_cost=default, tried=tried)


def line(workload: Workload, chip: str, best: Best | None) -> str:
    """Returns the line that tells the result of a search."""
    head = f"{workload.name:<34} {chip:<6}"
    if best is None:
        return f"{head} has no figure with the package's own block sizes"
    ratio = best.default_cost / best.cost
    return f"{head} best {best.contestant.blocks}, default {ratio:.3f} of it; tried: {', '.join(best.tried)}"


def entry_of(workload: Workload, best: Best, *, how: str) -> dict[str, Any]:
    """Returns the entry to write into the data file."""
    fields = {
        "shape": dataclasses.asdict(shape_of(workload)),
        "block_sizes": {"q_rows": best.contestant.q_rows, "kv_pages": best.contestant.kv_pages},
        "cost": round(best.cost, 2),
        "default_cost": round(best.default_cost, 2),
        "how": how,
        "workload": workload.name,
        **versions(),
        "date": time.strftime("%Y-%m-%d"),
    }
    Entry.from_json(fields)  # raises if the package could not read it
    return fields


def replace(path: Path, shape: Shape, entry: dict[str, Any] | None) -> None:
    """Replace the file's entry for the shape by `entry`, or delete it for None. Lines are sorted by workload."""
    lines: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    kept = [line for line in lines if line["shape"] != dataclasses.asdict(shape)]
    kept += [entry] if entry else []
    ordered = sorted(kept, key=lambda line: line["workload"])
    path.write_text("[\n" + ",\n".join(json.dumps(line) for line in ordered) + "\n]\n" if ordered else "[]\n")


if __name__ == "__main__":
    sys.exit(main())
