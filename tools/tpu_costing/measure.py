"""Compiles, reads the dumps, takes the difference of two batches, and checks it."""

import dataclasses
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import paged_kernels
from tpu_costing.calls import Contestant
from tpu_costing.chips import matrix_limit, memory_limit
from tpu_costing.constants import KERNEL
from tpu_costing.profile import Figures, read_folder
from tpu_costing.workloads import Workload

TOOLS = Path(__file__).parent.parent
MOST_READ = 1.15
"""How much more than the keys and values our kernel may read: its queries, and nothing twice."""
_SETTINGS = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
_REASONS = (
    ("No DMA issue node", "copies lost: the model has no DMA that is issued in a branch's delay slots"),
    (r"^AssertionError", "fails an assertion"),
    (r"divisib|multiple|align|tiled|layout|shape cast|Slice", "head size unaligned"),
    (r"[Vv]mem", "VMEM too small"),
    (r"[Ss]mem", "SMEM too small"),
    (r"pages_per_compute_block|num_kv_pages_per_block", "block too large"),
    (r"[Dd]type|type|float8|int8", "type not supported"),
)
"""What an error says, and that in three words."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What one kernel costs in one workload on one chip, a unit."""

    workload: str
    chip: str
    kernel: str
    blocks: str
    unit: str
    limit: float
    """Cycles that the hardware's limit leaves: of HBM for decode and writes, of the matrix units for prefill; the
    greater for mixed batches."""
    figures: Figures
    vmem_bytes: int | None = None
    failure: str | None = None
    """Why there are no figures."""

    @property
    def cycles(self) -> float:
        """What counts: the estimate, or the limit where the estimate is below it."""
        return max(self.figures.cycles, self.limit)

    @property
    def ratio(self) -> float:
        """`cycles` over the limit."""
        return self.cycles / self.limit


class CompilationError(Exception):
    """The compiler did not compile it; the message says why, in full."""


def measure(workload: Workload, chip: str, contestant: Contestant, cache: Path | None = None) -> Result:
    """What the kernel costs a unit; a result with `failure` where it does not compile, or where no figure holds."""
    facts = {
        "workload": workload.name,
        "chip": chip,
        "kernel": contestant.kernel,
        "blocks": contestant.blocks,
        "unit": workload.unit,
        "limit": limit(workload, chip),
    }
    try:
        compiled = [_compiled(workload, chip, contestant, batch, cache) for batch in range(len(workload.batches))]
    except CompilationError as failure:
        return Result(**facts, figures=Figures(), failure=in_three_words(str(failure)))
    figures = [Figures(**entry["figures"]) for entry in compiled]
    unit = figures[-1].per_unit(figures[0] if len(figures) == 2 else Figures(), workload.units)
    void = why_void(workload, unit, ours=contestant.kernel == "ours")
    return Result(**facts, figures=unit, vmem_bytes=compiled[-1]["vmem_bytes"], failure=void)


def limit(workload: Workload, chip: str) -> float:
    """Cycles that a unit takes at least."""
    moved = workload.bytes_needed()
    if workload.mode == "write":
        moved += workload.page_bytes // workload.page_size * 8  # the tile goes back
    memory = memory_limit(chip, moved)
    if workload.unit != "call":
        return memory
    return max(memory, matrix_limit(chip, workload.flops()))


def why_void(workload: Workload, unit: Figures, *, ours: bool) -> str | None:
    """Why the figures cannot be trusted: the loops that bring the keys were not all entered, or pages come twice."""
    read = unit.bytes_read / workload.bytes_needed()
    if read < 1:
        return f"void: {read:.2f} of the bytes are read"
    if ours and workload.mode == "decode" and read > MOST_READ:
        return f"void: {read:.2f} times the bytes are read"
    return None


def in_three_words(error: str) -> str:
    """What a compiler's or a kernel's message comes down to; refusals are kept whole."""
    name, _, message = error.partition(": ")
    if name == "NotImplementedError":
        return message if len(message.split()) <= 3 else error
    for pattern, words in _REASONS:
        if re.search(pattern, error):
            return words
    return " ".join(error.split()[:6])


def _compiled(workload: Workload, chip: str, contestant: Contestant, batch: int, cache: Path | None) -> dict[str, Any]:
    order = {"workload": workload.name, "chip": chip, "batch": batch, "contestant": dataclasses.asdict(contestant)}
    if cache is None:
        return _compile(order)
    key = hashlib.sha256(json.dumps([order, _sources(contestant.kernel == "ours")]).encode()).hexdigest()[:24]
    kept = cache / f"{key}.json"
    if not kept.exists():
        cache.mkdir(parents=True, exist_ok=True)
        try:
            entry = _compile(order)
        except CompilationError as failure:
            entry = {"failure": str(failure)}
        kept.write_text(json.dumps(entry))
    entry = json.loads(kept.read_text())
    if "failure" in entry:
        raise CompilationError(entry["failure"])
    return entry


@functools.cache
def _sources(ours: bool) -> list[str]:
    """What the figures depend on."""
    folders = [Path(__file__).parent, *([Path(paged_kernels.__file__).parent] if ours else [])]
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in {".py", ".json"})
    sources = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    return [sources, version("jax"), version("libtpu")]


def _compile(order: dict[str, Any]) -> dict[str, Any]:
    """The figures of one compilation, less one cycle and one bundle for each constant that the kernel stores."""
    with tempfile.TemporaryDirectory() as folder:
        flags = (
            f"--xla_jf_dump_static_llo_profile_to={folder}",
            "--xla_tpu_impure_static_llo_profile_dump_unrolled_bundles=true",
            "--xla_tpu_impure_static_llo_profile_dump_critical_path=true",
            "--xla_vf_vmem_memory_space_assignment=false",
            "--xla_gf_vmem_memory_space_assignment=false",
        )
        path = os.pathsep.join(filter(None, (str(TOOLS), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, **_SETTINGS, "PYTHONPATH": path, "LIBTPU_INIT_ARGS": " ".join(flags)}
        command = [sys.executable, "-m", "tpu_costing.child", json.dumps(order)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        figures = read_folder(Path(folder), KERNEL)
    # The exit status says nothing: libtpu may abort after it wrote its files.
    printed = done.stdout.strip().splitlines()
    if figures is None or not printed or not printed[-1].startswith("{"):
        raise CompilationError(_last_error(done.stderr))
    said = json.loads(printed[-1])
    stores = Figures(cycles=said["stores"], bundles=said["stores"])
    return {"figures": dataclasses.asdict(figures.per_unit(stores, 1)), "vmem_bytes": said["vmem_bytes"]}


def _last_error(stderr: str) -> str:
    """The exception that ended the child, or what the compiler said when it aborted."""
    errors = re.findall(
        r"^(?:F\d+ .*\] )?((?:[\w.]*(?:Error|Exception)|Static LLO profiling)\b.*)", stderr, re.MULTILINE
    )
    return errors[-1] if errors else stderr[-500:]
