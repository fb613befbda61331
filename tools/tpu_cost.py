"""Estimates the cost of paged attention on a TPU with the TPU compiler's cost model. Needs libtpu, and no TPU.

    python tools/tpu_cost.py decode-32-8-128-p16-c8192 --chip v6e
    python tools/tpu_cost.py decode window --chip v5e v6e --compare --json cost.json --plot cost.png
    python tools/tpu_cost.py --compare                       (the whole base set on all chips: hours)

The name of a workload is MODE-QHEADS-KVHEADS-HEADDIM[-pPAGE][-nNEW][-cCONTEXT][-wWINDOW][-DTYPE]. MODE is one of:
decode (figures per page), prefill or mixed (figures per call), write (figures per row; without QHEADS). DTYPE is the
type of the pages: bfloat16, float32, int8, float8_e4m3fn, float8_e5m2. --list shows the base set and its parts. Any
other workload can be named too.

Cycles, bundles, DMAs and spills come from the compiler's static cost model of the compiled kernel. They have never been
checked on a chip. Use them for ratios and to find regressions. Decode and write are compiled at two sizes, and the
figures are the difference. So the cost of start-up is left out, and the cost of each sequence stays in. If the bytes
read do not match the workload, the model did not enter the kernel's loops, and no figure is shown.

`limit` is a least number of cycles. For decode and write it is the bytes of keys and values over HBM's bandwidth. For
prefill it is the operations of the causal work over the matrix units' peak, with heads rounded up to the unit's width
of 128 or 256. The model lets several DMAs exceed HBM's bandwidth, so ratios use max(cycles, limit). --compare adds the
kernels that jax ships, with bounds checks on as they ship, at the best of a few block sizes. docs/kernels/cost.md
explains all figures.

    python tools/tpu_cost.py --model llama-3-8b --topology v5e:2x4 --seqs 32 --context 4096 --chunk 2048

--model compiles whole decode and prefill steps of a model for a slice, without weights. It prints the memory of each
device, the pages that fit, the collectives with their bytes, and an estimate of each step: the greater of HBM's and the
matrix units' least time for the weights, plus attention by the cost model (its limit where that has no figure). The
estimate leaves out the time of the collectives, and has never been checked on a chip.

--time measures instead: it runs the calls on the attached TPU and prints microseconds per call. For decode that is the
larger of the two batches. This has never been run on a TPU.
"""

import argparse
import itertools
import sys
from pathlib import Path

from tpu_costing import model_cost, report, timing
from tpu_costing.calls import Contestant, peers
from tpu_costing.child_process import ChildError, in_three_words
from tpu_costing.chips import LIMITS
from tpu_costing.measure import Result, measure
from tpu_costing.workloads import GROUPS, Workload, choose


def main() -> None:
    """Read the options, and list, time or estimate the workloads."""
    options = parse()
    if options.list:
        for group, names in GROUPS.items():
            print(f"{group}:", *names, sep="\n  ")
    elif options.model:
        print_model(options)
    elif options.time:
        print_times(options)
    else:
        groups = print_estimates(options)
        write_files(options, groups)


def print_model(options: argparse.Namespace) -> None:
    """Compile the steps of a model, and print what they need."""
    try:
        print(*model_cost.lines(options.run, attention=not options.no_attention), sep="\n")
    except ChildError as error:
        sys.exit(f"{options.model} on {options.topology} does not compile: {error}")


def print_estimates(options: argparse.Namespace) -> list[list[Result]]:
    """Estimate each workload on each chip, and print the table. Returns all results."""
    groups = []
    print(report.HEADER, flush=True)
    pairs = list(itertools.product(options.workloads, options.chip))
    for number, (workload, chip) in enumerate(pairs, start=1):
        group = measured(workload, chip, options, f"{number}/{len(pairs)}")
        groups.append(group)
        for result in report.best_by_kernel(group):
            print(report.line(result, group[0]), flush=True)
            if options.account and result.failure is None:
                print(report.account(result), flush=True)
    if options.compare:
        print(report.last_line(groups))
    return groups


def write_files(options: argparse.Namespace, groups: list[list[Result]]) -> None:
    """Write the files that the options name."""
    if options.json:
        report.write_json(options.json, groups)
    if options.markdown:
        options.markdown.write_text(report.markdown(groups))
    if options.plot:
        report.plot(options.plot, groups)


def parse() -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names_help = "workloads and parts of the base set (default: the base set)"
    parser.add_argument("names", nargs="*", metavar="WORKLOAD", help=names_help)
    parser.add_argument(
        "--chip", nargs="+", choices=LIMITS, default=list(LIMITS), help="default: all; the cost model has no v4"
    )
    parser.add_argument("--compare", action="store_true", help="also measure the kernels that jax ships")
    parser.add_argument("--blocks", metavar="ROWSxPAGES", help="block sizes of our kernel (default: its own choice)")
    parser.add_argument("--account", action="store_true", help="also show operations per unit, by kind")
    parser.add_argument("--time", action="store_true", help="time the calls on the attached TPU")
    parser.add_argument("--list", action="store_true", help="show the base set and its parts, and stop")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures to this file")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw the table into this image (needs matplotlib)")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="write a table to this file")
    parser.add_argument(
        "--cache", type=Path, metavar="FOLDER", help="keep figures in this folder until sources or versions change"
    )
    model_options(parser)
    options = parser.parse_args()
    try:
        options.run = model_run(options) if options.model else None
        options.workloads = choose(options.names)
        options.ours = our_contestant(options.blocks)
    except ValueError as error:
        parser.error(str(error))
    return options


def model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of --model."""
    parser.add_argument("--model", metavar="NAME", help=f"cost a whole model: {', '.join(model_cost.models())}")
    parser.add_argument("--topology", default="v5e:2x4", metavar="CHIP:SIZE", help="the slice (default: v5e:2x4)")
    parser.add_argument("--seqs", type=int, default=32, metavar="N", help="sequences that decode (default: 32)")
    parser.add_argument("--context", type=int, default=4096, metavar="N", help="their tokens (default: 4096)")
    parser.add_argument("--chunk", type=int, default=2048, metavar="N", help="rows of a prefill (default: 2048)")
    parser.add_argument("--page-size", type=int, default=16, metavar="N", help="tokens of a page (default: 16)")
    parser.add_argument("--no-attention", action="store_true", help="leave attention out of the estimate: much quicker")


def model_run(options: argparse.Namespace) -> model_cost.ModelRun:
    """Returns the model and slice of the options."""
    names = ("model", "topology", "seqs", "context", "chunk", "page_size")
    return model_cost.ModelRun(**{name: getattr(options, name) for name in names})


def our_contestant(blocks: str | None) -> Contestant:
    """Returns our kernel with block sizes `ROWSxPAGES`.

    Raises:
        ValueError: `blocks` is not of this form.
    """
    if blocks is None:
        return Contestant(kernel="ours")
    rows, _, pages = blocks.partition("x")
    if not (rows.isdecimal() and pages.isdecimal()):
        raise ValueError(f"--blocks {blocks!r} must be ROWSxPAGES, for example 1x64")
    return Contestant(kernel="ours", q_rows=int(rows), kv_pages=int(pages))


def measured(workload: Workload, chip: str, options: argparse.Namespace, number: str) -> list[Result]:
    """Returns each contestant's result, ours first."""
    results = []
    for contestant in (options.ours, *(peers(workload) if options.compare else ())):
        progress(f"{number} {workload.name} {chip} {contestant.kernel} {contestant.blocks} ...")
        results.append(measure(workload, chip, contestant, options.cache))
    progress("")
    return results


def print_times(options: argparse.Namespace) -> None:
    """Time each contestant of each workload on the attached TPU. Prints one line for each."""
    try:
        chip = timing.ask_chip()
    except ChildError as error:
        sys.exit(str(error))
    for workload in options.workloads:
        for contestant in (options.ours, *(peers(workload) if options.compare else ())):
            progress(f"{workload.name} {contestant.kernel} {contestant.blocks} ...")
            try:
                taken = f"{timing.ask_microseconds(workload, contestant):.1f} us"
            except ChildError as error:
                taken = f"fails: {in_three_words(str(error))}"
            progress("")
            print(f"{workload.name:<34} {chip:<6} {contestant.kernel:<10} {contestant.blocks:>9} {taken}", flush=True)


def progress(text: str) -> None:
    """Replace the previous progress text, if stderr is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
