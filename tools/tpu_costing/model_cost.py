"""What a model needs on each device of a slice, and an estimate of the time of its steps."""

import dataclasses
from pathlib import Path
from typing import Any

from tpu_costing.calls import Contestant
from tpu_costing.child_process import ask
from tpu_costing.chips import LIMITS, matrix_limit, memory_limit
from tpu_costing.measure import measure
from tpu_costing.workloads import Workload

MODELS = Path(__file__).parent / "models"
"""A config.json for each model: its sizes, which its publisher states."""
GIB = 2**30
HBM_BYTES = {"v5e": 16 * GIB, "v6e": 32 * GIB, "tpu7x": 96 * GIB}
"""HBM of a device: of a chip, or of one of a TPU7x's two cores (cloud.google.com/tpu/docs)."""
USED = 0.9
"""The share of HBM that weights, pages and temporaries may take, as `CacheConfig.for_spec` has it."""
BYTES = 2  # of a weight in bfloat16
_SETTINGS = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelRun:
    """A model on a slice, whose steps decode `seqs` sequences of `context` tokens, or prefill `chunk` rows of one."""

    model: str
    topology: str
    seqs: int
    context: int
    chunk: int
    page_size: int

    def __post_init__(self) -> None:
        if self.model not in models():
            raise ValueError(f"--model {self.model!r} must be one of {', '.join(models())}")
        if self.chip not in HBM_BYTES:
            raise ValueError(f"--topology {self.topology!r} must begin with one of {', '.join(HBM_BYTES)} and a colon")

    @property
    def chip(self) -> str:
        """The chip of the slice."""
        return self.topology.partition(":")[0]

    def compiled(self, mode: str) -> dict[str, Any]:
        """Returns what the compiler says of a step.

        Raises:
            ChildError: it does not compile; the message is the compiler's.
        """
        order = {
            "model": self.model,
            "topology": self.topology,
            "rows": self.seqs if mode == "decode" else self.chunk,
            "max_q_len": 1 if mode == "decode" else self.chunk,
            "seqs": self.seqs,
            "pages_per_seq": -(-self.context // self.page_size),
            "page_size": self.page_size,
        }
        return ask("model_compilation", order, **_SETTINGS)


def lines(run: ModelRun, *, attention: bool) -> list[str]:
    """Returns the report: memory, pages that fit, and each step's collectives and estimate.

    Raises:
        ChildError: a step does not compile.
    """
    steps = {mode: run.compiled(mode) for mode in ("decode", "prefill")}
    first = steps["decode"]
    weights, temporary = first["weights_bytes"], max(step["temporary_bytes"] for step in steps.values())
    page = first["pages_bytes"] // first["num_pages"]
    pages = int(USED * HBM_BYTES[run.chip] - weights - temporary) // page
    tokens = pages // first["groups"] * run.page_size
    report = [
        f"{run.model} on {run.topology}: {first['devices']} devices, weights split over all, in bfloat16",
        f"  each device: HBM {HBM_BYTES[run.chip] / GIB:.0f} GiB, weights {weights / GIB:.2f} GiB, "
        f"temporaries {temporary / GIB:.3f} GiB, a page {page:,} bytes",
        f"  pages that fit into {USED:.0%} of HBM: {pages:,} (at least {tokens:,} tokens)",
    ]
    for mode, step in steps.items():
        report += step_lines(run, mode, step, attention=attention)
    return report


def step_lines(run: ModelRun, mode: str, step: dict[str, Any], *, attention: bool) -> list[str]:
    """Returns the lines for one step."""
    what = f"{run.seqs} sequences of {run.context}" if mode == "decode" else f"{run.chunk} rows of one sequence"
    sent = "unknown: libtpu cannot print this program"
    if step["collectives"] is not None:
        kinds = step["collectives"].items()
        sent = "; ".join(f"{count} {kind} of {size / 1e6:.2f} MB" for kind, (count, size) in kinds) or "none"
    in_place = "in place" if step["in_place_bytes"] >= step["pages_bytes"] else "COPIED"
    weights = weight_cycles(run, mode, step)
    parts = weights | (attention_cycles(run, mode, step["attention"]) if attention else {})
    to_ms = 1e3 / LIMITS[run.chip].clock
    total = max(weights.values()) + sum(parts.values()) - sum(weights.values())
    detail = ", ".join(f"{name} {cycles * to_ms:.2f}" for name, cycles in parts.items())
    left_out = "the collectives' time" if attention else "attention and the collectives' time"
    return [
        f"  {mode}, {what}: pages {in_place}; collectives: {sent}",
        f"    estimate {total * to_ms:.2f} ms, without {left_out}; ms of each: {detail}",
    ]


def weight_cycles(run: ModelRun, mode: str, step: dict[str, Any]) -> dict[str, float]:
    """Returns the least cycles to read the weights that a step needs, and to multiply with them."""
    weights, share = step["weights"], step["experts_per_row"]
    rows, last_rows = (run.seqs, run.seqs) if mode == "decode" else (run.chunk, 1)
    read = weights["rest"] + weights["head"] + weights["experts"] * min(1, rows * share)
    products = rows * (weights["rest"] + weights["experts"] * share) + last_rows * weights["head"]
    return {"memory": memory_limit(run.chip, BYTES * int(read)), "matrix": matrix_limit(run.chip, 2 * int(products))}


def attention_cycles(run: ModelRun, mode: str, kinds: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the cycles of attention in all layers by the compiler's cost model.

    Where it has no figure for a layer, the layer's limit counts, and the name says so.
    """
    total, name = 0.0, "attention"
    for kind in kinds:
        shape = {"page_size": run.page_size, **kind["shape"]}
        if mode == "decode":
            workload = Workload(mode="decode", context=run.context, **shape)
        else:
            workload = Workload(mode="prefill", new_tokens=run.chunk, **shape)
        result = measure(workload, run.chip, Contestant(kernel="ours"))
        if result.failure:
            name = f"attention (partly its limit: {result.failure})"
        units = workload.pages_seen * run.seqs if mode == "decode" else 1
        total += kind["layers"] * units * (result.limit if result.failure else result.cycles)
    return {name: total}


def models() -> list[str]:
    """Returns the names of the models."""
    return sorted(path.stem for path in MODELS.glob("*.json"))
