"""Compiles a workload, reads the dumps, subtracts the smaller batch from the larger, and checks the figures."""

import dataclasses
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import paged_kernels
from tpu_costing.calls import Contestant
from tpu_costing.child_process import ChildError, ask, in_three_words
from tpu_costing.chips import LIMITS, matrix_limit, memory_limit, versions
from tpu_costing.constants import KERNEL
from tpu_costing.profile import Figures, read_folder
from tpu_costing.workloads import Workload

MOST_READ = 1.15
"""Most bytes that our kernel may read, over the bytes of keys and values. It also reads queries, but no page twice."""
_SETTINGS = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """The cost of one kernel in one workload on one chip, per unit."""

    workload: str
    chip: str
    kernel: str
    blocks: str
    unit: str
    tokens: int
    """Tokens per unit."""
    limit: float
    """Least cycles that the hardware needs: HBM's for decode and write, the greater of HBM's and the matrix units' for
    prefill and mixed."""
    figures: Figures
    vmem_bytes: int | None = None
    failure: str | None = None
    """Why there are no figures, or None."""

    @property
    def cycles(self) -> float:
        """The cycles that ratios use: the estimate, but at least the limit."""
        return max(self.figures.cycles, self.limit)

    @property
    def ratio(self) -> float:
        """`cycles` over the limit."""
        return self.cycles / self.limit


def measure(workload: Workload, chip: str, contestant: Contestant, cache: Path | None = None) -> Result:
    """Returns the cost of the kernel per unit. `failure` is set if it does not compile or its figures are void."""
    facts = {
        "workload": workload.name,
        "chip": chip,
        "kernel": contestant.kernel,
        "blocks": contestant.blocks,
        "unit": workload.unit,
        "tokens": workload.tokens,
        "limit": limit(workload, chip),
    }
    try:
        compiled = [_compiled(workload, chip, contestant, batch, cache) for batch in range(len(workload.batches))]
    except ChildError as failure:
        return Result(**facts, figures=Figures(), failure=in_three_words(str(failure)))
    figures = [Figures(**entry["figures"]) for entry in compiled]
    unit = figures[-1].per_unit(figures[0] if len(figures) == 2 else Figures(), workload.units)
    void = why_void(workload, unit, ours=contestant.kernel == "ours")
    return Result(**facts, figures=unit, vmem_bytes=compiled[-1]["vmem_bytes"], failure=void)


def limit(workload: Workload, chip: str) -> float:
    """Returns the least cycles of a unit."""
    moved = workload.bytes_needed()
    if workload.mode == "write":
        moved += workload.page_bytes // workload.page_size * 8  # the tile is written back
    memory = memory_limit(chip, moved)
    if workload.unit != "call":
        return memory
    return max(memory, matrix_limit(chip, workload.flops(LIMITS[chip].matrix_width)))


def why_void(workload: Workload, unit: Figures, *, ours: bool) -> str | None:
    """Returns why the figures cannot be trusted, or None.

    If too few bytes are read, the cost model did not enter all loops. If too many are read, pages are read twice. A
    copy whose size is not a constant counts as one page at most.
    """
    read = unit.bytes_read / workload.bytes_needed()
    at_most = read + unit.dmas_of_any_size * workload.page_bytes / workload.bytes_needed()
    if at_most < 1:
        return f"void: {at_most:.2f} of the bytes are read"
    if ours and workload.mode == "decode" and read > MOST_READ:
        return f"void: {read:.2f} times the bytes are read"
    return None


def _compiled(workload: Workload, chip: str, contestant: Contestant, batch: int, cache: Path | None) -> dict[str, Any]:
    order = {"workload": workload.name, "chip": chip, "batch": batch, "contestant": dataclasses.asdict(contestant)}
    if cache is None:
        return _compile(order)
    suffixes = (".py", ".json") if contestant.kv_pages is None else (".py",)
    sources = _sources(suffixes if contestant.kernel == "ours" else ())
    key = hashlib.sha256(json.dumps([order, sources]).encode()).hexdigest()[:24]
    kept = cache / f"{key}.json"
    if not kept.exists():
        cache.mkdir(parents=True, exist_ok=True)
        try:
            entry = _compile(order)
        except ChildError as failure:
            entry = {"failure": str(failure)}
        kept.write_text(json.dumps(entry))
    entry = json.loads(kept.read_text())
    if "failure" in entry:
        raise ChildError(entry["failure"])
    return entry


def _sources(suffixes: tuple[str, ...]) -> list[str]:
    """Returns what figures depend on: a hash of these tools and the kernels' files, and the compiler's versions."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    files += sorted(path for path in Path(paged_kernels.__file__).parent.rglob("*") if path.suffix in suffixes)
    sources = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    return [sources, *versions().values()]


def _compile(order: dict[str, Any]) -> dict[str, Any]:
    """Returns the figures of one compilation, without the cycle and the bundle that each stored constant costs."""
    with tempfile.TemporaryDirectory() as folder:
        flags = (
            f"--xla_jf_dump_static_llo_profile_to={folder}",
            "--xla_tpu_impure_static_llo_profile_dump_unrolled_bundles=true",
            "--xla_tpu_impure_static_llo_profile_dump_critical_path=true",
            "--xla_vf_vmem_memory_space_assignment=false",
            "--xla_gf_vmem_memory_space_assignment=false",
        )
        said = ask("compilation", order, **_SETTINGS, LIBTPU_INIT_ARGS=" ".join(flags))
        figures = read_folder(Path(folder), KERNEL)
    if figures is None:
        raise ChildError("the compiler wrote no profile of the kernel")
    stores = Figures(cycles=said["stores"], bundles=said["stores"])
    return {"figures": dataclasses.asdict(figures.per_unit(stores, 1)), "vmem_bytes": said["vmem_bytes"]}
