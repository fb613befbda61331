"""Searches the block sizes of the attention kernel and writes the best into the package's tuning data.

    python tools/tune.py --chip v6e decode-8-1-128-p16-c8192      by estimated cycles; needs libtpu and no TPU
    python tools/tune.py --time                                   by time, on the TPU that is attached

A workload is named as for `tools/tpu_cost.py`, and stands for every call of its shape: chip, decode or prefill, heads,
head size, page size, type. All sizes of a grid are tried: blocks of keys by powers of two and, in prefill, blocks of
query rows. What is written is what was best, with what the heuristic's own choice costs beside it. An entry of the same
shape is dropped first, and comes back only where it is better than the heuristic. --dry-run only prints, and compares
with what the package would do now, entry or heuristic.
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

import paged_kernels
from paged_kernels._src.tpu.tuning.lookup import Entry, Shape

DATA = Path(paged_kernels.__file__).parent / "_src" / "tpu" / "tuning" / "data"
DECODE_KEYS = (256, 512, 1024, 2048, 4096)
PREFILL_KEYS = (128, 256, 512, 1024)
Q_ROWS = (16, 32, 64, 128, 256)
DEFAULT = Contestant(kernel="ours")
Cost = Callable[[Contestant], float | None]
"""What a choice of block sizes costs, None where it does not compile."""


def main() -> None:
    """Search each workload on each chip."""
    options = parse()
    chips = [timing.ask_chip()] if options.time else options.chip
    for chip in chips:
        for workload in options.workloads:
            tune(workload, chip, options)


def tune(workload: Workload, chip: str, options: argparse.Namespace) -> None:
    """Search one shape on one chip, print what is found, and keep it."""
    path = DATA / f"{chip}.json"
    if not options.dry_run:
        replace(path, shape_of(workload), None)
    best = search(candidates(workload), cost_by(workload, chip, options))
    print(line(workload, chip, best), flush=True)
    if best is not None and best.cost < best.default_cost and not options.dry_run:
        replace(path, shape_of(workload), entry_of(workload, best, how="timed" if options.time else "estimated"))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="WORKLOAD", help="workloads and groups (default: decode prefill)")
    parser.add_argument("--chip", nargs="+", choices=LIMITS, default=list(LIMITS), help="default: all")
    parser.add_argument("--time", action="store_true", help="by time on the attached TPU; its chip is the chip")
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="keep figures there while the sources stay")
    options = parser.parse_args()
    try:
        options.workloads = tunable(choose(options.names or ["decode", "prefill"]))
    except ValueError as error:
        parser.error(str(error))
    return options


def tunable(workloads: Iterable[Workload]) -> list[Workload]:
    """One workload of each shape: of decode the longest context, of prefill the most work.

    Raises:
        ValueError: a workload has no block sizes to tune, or none of its own.
    """
    by_shape: dict[Shape, Workload] = {}
    for workload in sorted(workloads, key=lambda w: w.context * w.new_tokens):
        if workload.mode not in {"decode", "prefill"} or workload.window is not None:
            raise ValueError(f"workload {workload.name!r} must be of decode or prefill, without a window, to be tuned")
        by_shape[shape_of(workload)] = workload
    return list(by_shape.values())


def shape_of(workload: Workload) -> Shape:
    """The key of the tuning data."""
    return Shape(
        mode="decode" if workload.mode == "decode" else "prefill",
        q_per_kv=workload.q_heads // workload.kv_heads,
        kv_heads=workload.kv_heads,
        head_dim=workload.head_dim,
        page_size=workload.page_size,
        kv_dtype=workload.dtype,
    )


def candidates(workload: Workload) -> list[Contestant]:
    """The grid."""
    decode = workload.mode == "decode"
    tokens = workload.context + (0 if decode else workload.new_tokens)
    keys = [n for n in (DECODE_KEYS if decode else PREFILL_KEYS) if workload.page_size <= n <= tokens]
    rows = (1,) if decode else [n for n in Q_ROWS if n <= workload.new_tokens]
    return [Contestant(kernel="ours", q_rows=r, kv_pages=n // workload.page_size) for r in rows for n in keys]


def cost_by(workload: Workload, chip: str, options: argparse.Namespace) -> Cost:
    """The measure: time where asked for, else estimated cycles."""

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
    """The cheapest of a search."""

    contestant: Contestant
    cost: float
    default_cost: float
    tried: tuple[str, ...]
    """All that compiled, with their costs, to print."""


def search(contestants: list[Contestant], cost: Cost) -> Best | None:
    """The cheapest, the default among them; None where the default has no cost."""
    default = cost(DEFAULT)
    if default is None:
        return None
    costs = [(default, DEFAULT)]
    costs += [(found, contestant) for contestant in contestants if (found := cost(contestant)) is not None]
    least, contestant = min(costs, key=lambda pair: pair[0])
    tried = tuple(f"{contestant.blocks} {found:.1f}" for found, contestant in costs)
    return Best(contestant=contestant, cost=least, default_cost=default, tried=tried)


def line(workload: Workload, chip: str, best: Best | None) -> str:
    """What a search found."""
    head = f"{workload.name:<34} {chip:<6}"
    if best is None:
        return f"{head} has no figure with the package's own block sizes"
    ratio = best.default_cost / best.cost
    return f"{head} best {best.contestant.blocks}, default {ratio:.3f} of it; tried: {', '.join(best.tried)}"


def entry_of(workload: Workload, best: Best, *, how: str) -> dict[str, Any]:
    """The line of the data file."""
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
    Entry.from_json(fields)  # what is written can be read
    return fields


def replace(path: Path, shape: Shape, entry: dict[str, Any] | None) -> None:
    """Put the entry in place of the one that the file has for the shape; a line each, in order of workload."""
    lines: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    kept = [line for line in lines if line["shape"] != dataclasses.asdict(shape)]
    kept += [entry] if entry else []
    ordered = sorted(kept, key=lambda line: line["workload"])
    path.write_text("[\n" + ",\n".join(json.dumps(line) for line in ordered) + "\n]\n" if ordered else "[]\n")


if __name__ == "__main__":
    sys.exit(main())
