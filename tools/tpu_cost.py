"""What paged attention costs on a TPU by the account of the TPU compiler; needs libtpu and no TPU.

    python tools/tpu_cost.py decode-32-8-128-p16-c8192 --chip v6e
    python tools/tpu_cost.py decode window --chip v5e v6e --compare --json cost.json --plot cost.png
    python tools/tpu_cost.py --compare                       (the whole base set on all chips: hours)

A workload is named MODE-QHEADS-KVHEADS-HEADDIM[-pPAGE][-nNEW][-cCONTEXT][-wWINDOW][-DTYPE]; --list shows the base set
and its groups, and any other can be named. MODE is decode (figures a page), prefill and mixed (figures a call), or
write (no QHEADS; figures a row). DTYPE is that of the pages: bfloat16, float32, int8, float8_e4m3fn, float8_e5m2.

Cycles, bundles, DMAs and spills come from the compiler's static cost model of the kernel as compiled. They have never
been checked against a chip: they are good for ratios and regressions. Decode and write are compiled at two sizes, and
the figures are the difference: start-up drops out, what each sequence costs stays in. Where the bytes that are read are
not those of the workload, the model did not enter the kernel's loops, and there is no figure.

`limit` is HBM's for decode and write (bytes of keys and values over bandwidth) and the matrix units' for prefill
(operations of the causal work over peak, heads rounded up to the unit's width of 128 or 256). The model lets several
DMAs exceed HBM's bandwidth, so what counts in ratios is max(cycles, limit). --compare adds the kernels that jax ships
as they ship, bounds checks on, at the best of a few block sizes. docs/kernels/cost.md says how to read it all.

--time runs the calls instead, on the TPU that is attached, and prints microseconds a call (of decode, the larger of the
two batches). This has never been run on a TPU.
"""

import argparse
import itertools
import sys
from pathlib import Path

from tpu_costing import report, timing
from tpu_costing.calls import Contestant, peers
from tpu_costing.child_process import ChildError, in_three_words
from tpu_costing.chips import LIMITS
from tpu_costing.measure import Result, measure
from tpu_costing.workloads import GROUPS, Workload, choose


def main() -> None:
    """Do what is asked for."""
    options = parse()
    if options.list:
        for group, names in GROUPS.items():
            print(f"{group}:", *names, sep="\n  ")
    elif options.time:
        print_times(options)
    else:
        groups = print_estimates(options)
        write_files(options, groups)


def print_estimates(options: argparse.Namespace) -> list[list[Result]]:
    """Estimate each workload on each chip, and print the table; all results."""
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
    """Write the files that are asked for."""
    if options.json:
        report.write_json(options.json, groups)
    if options.markdown:
        options.markdown.write_text(report.markdown(groups))
    if options.plot:
        report.plot(options.plot, groups)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="WORKLOAD", help="workloads and groups (default: the base set)")
    parser.add_argument(
        "--chip", nargs="+", choices=LIMITS, default=list(LIMITS), help="default: all; the model has no v4"
    )
    parser.add_argument("--compare", action="store_true", help="also the kernels that jax ships")
    parser.add_argument("--blocks", metavar="ROWSxPAGES", help="block sizes of ours (default: those that it picks)")
    parser.add_argument("--account", action="store_true", help="also the operations a unit, by what they keep busy")
    parser.add_argument("--time", action="store_true", help="time the calls on the attached TPU")
    parser.add_argument("--list", action="store_true", help="show the base set and its groups, and stop")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures there")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw the table there (needs matplotlib)")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="write a line a workload there")
    parser.add_argument(
        "--cache", type=Path, metavar="FOLDER", help="keep figures there, until sources or versions change"
    )
    options = parser.parse_args()
    try:
        options.workloads = choose(options.names)
        options.ours = our_contestant(options.blocks)
    except ValueError as error:
        parser.error(str(error))
    return options


def our_contestant(blocks: str | None) -> Contestant:
    """Our kernel with block sizes `ROWSxPAGES`.

    Raises:
        ValueError: they do not read so.
    """
    if blocks is None:
        return Contestant(kernel="ours")
    rows, _, pages = blocks.partition("x")
    if not (rows.isdecimal() and pages.isdecimal()):
        raise ValueError(f"--blocks {blocks!r} must read ROWSxPAGES, for example 1x64")
    return Contestant(kernel="ours", q_rows=int(rows), kv_pages=int(pages))


def measured(workload: Workload, chip: str, options: argparse.Namespace, number: str) -> list[Result]:
    """Each contestant's result, ours first."""
    results = []
    for contestant in (options.ours, *(peers(workload) if options.compare else ())):
        progress(f"{number} {workload.name} {chip} {contestant.kernel} {contestant.blocks} ...")
        results.append(measure(workload, chip, contestant, options.cache))
    progress("")
    return results


def print_times(options: argparse.Namespace) -> None:
    """Time each contestant of each workload on the attached TPU, a line each."""
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
    """Put the text in place of the last, where a person watches."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
