"""Reads figures from the compiler's dumps."""

import collections
import dataclasses
import functools
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

GRANULE = 32
"""Bytes per granule. The dumps give the size of a DMA in granules."""
_BUNDLE = re.compile(r"^0x[0-9a-f]+: bundle", re.MULTILINE)
_INSTRUCTION = re.compile(r"^  (?:%\S+ = )?([a-z][\w.]*)(.*)$", re.MULTILINE)
_STEP = re.compile(r"^Length to end: (\d+), (?:%\S+ = )?([a-z][\w.]*)", re.MULTILINE)
_FROM_HBM = re.compile(r"dma\.(?:hbm_to_vmem|general(?=.*/\* hbm-to-vmem \*/)).*/\*size_in_granules=\*/(\d+)")
_ANY_SIZE = re.compile(r"dma\.(?:hbm_to_vmem|general(?=.*/\* hbm-to-vmem \*/)).*/\*size_in_granules=\*/%")
_TO_HBM = re.compile(r"dma\.(?:vmem_to_hbm|general(?=.*/\* vmem-to-hbm \*/)).*/\*size_in_granules=\*/(\d+)")
_KINDS = (
    ("dma", r"dma\."),
    ("scalar", r"s[a-z]|p[a-z]|int_to_ptr"),
    ("matrix", r"vmat|vdwg|vmsk.*mat"),
    ("transcendental", r"vexp|vlog|vrcp|vrsqrt|vtanh|vpow|vpop\.(?:erf|eup)"),
    ("cross-lane", r"\S*(?:xlane|xlu|rot|perm|xpose)"),
    ("load", r"vld"),
    ("store", r"vst"),
    ("vector", r"v"),
)
"""Kind of an instruction, by the start of its name. The first that matches counts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """Counts of one compiled kernel, or of one unit of its work."""

    cycles: float = 0
    """Cycles, estimated by the compiler."""
    bundles: float = 0
    """Instruction words issued."""
    dmas: float = 0
    """Copies started between HBM and vector memory."""
    dmas_of_any_size: float = 0
    """Those of `dmas` from HBM whose size is not a constant. It may be 0."""
    bytes_read: float = 0
    """Bytes copied from HBM."""
    bytes_written: float = 0
    """Bytes copied to HBM."""
    vector_spills: float = 0
    """Vector registers stored to memory because there are too few registers."""
    scalar_spills: float = 0
    operations: dict[str, float] = dataclasses.field(default_factory=dict)
    """Number of operations by kind."""
    path: dict[str, float] = dataclasses.field(default_factory=dict)
    """Cycles of the critical path, by kind of the instruction that it waits for. Their sum is `cycles`. A copy counts
    with the part of its latency and transfer that nothing hides."""

    def __add__(self, other: "Figures") -> "Figures":
        return _combine(self, other, lambda a, b: a + b)

    def per_unit(self, smaller: "Figures", units: int) -> "Figures":
        """Returns the difference from `smaller`, divided by `units`."""
        return _combine(self, smaller, lambda a, b: (a - b) / units)


def _combine(a: Figures, b: Figures, op: Callable[[float, float], float]) -> Figures:
    def combine(x: Any, y: Any) -> Any:
        return {key: op(x.get(key, 0), y.get(key, 0)) for key in {**x, **y}} if isinstance(x, dict) else op(x, y)

    return Figures(**{f.name: combine(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Figures)})


def read_folder(folder: Path, kernel: str) -> Figures | None:
    """Returns the sum over the kernels in a dump folder whose names start with `kernel`. None if there is none."""
    profiles = sorted(folder.glob(f"{kernel}*_static_llo_profile.textproto"))
    total = None
    for profile in profiles:
        stem = profile.name.split("_TPU")[0]
        bundles, path = (folder / f"{stem}_{dump}.txt" for dump in ("bundles", "critical_path"))
        figures = read_texts(profile.read_text(), bundles.read_text(), path.read_text())
        total = figures if total is None else total + figures
    return total


def read_texts(profile: str, bundles: str, path: str) -> Figures:
    """Returns the figures of one kernel.

    Args:
        profile: text of the kernel's profile.
        bundles: text of all bundles that the kernel executes, in order.
        path: text of the kernel's critical path.
    """
    cycles = re.search(r"estimated_cycles: (\d+)", profile)
    counts: dict[str, float] = dict.fromkeys((kind for kind, _ in _KINDS), 0)
    moved: dict[re.Pattern[str], list[int]] = {_FROM_HBM: [], _TO_HBM: []}
    of_any_size = 0
    spills = {"vst": 0, "sst": 0}
    for name, operands in _INSTRUCTION.findall(bundles):
        kind = _kind(name)
        if kind is None:
            continue
        counts[kind] += 1
        if kind == "dma":
            of_any_size += _ANY_SIZE.match(name + operands) is not None
            for direction, sizes in moved.items():
                if match := direction.match(name + operands):
                    sizes.append(GRANULE * int(match[1]))
        elif name in spills and "_spill" in operands:
            spills[name] += 1
    return Figures(
        cycles=int(cycles[1]) if cycles else 0,
        bundles=len(_BUNDLE.findall(bundles)),
        dmas=sum(map(len, moved.values())) + of_any_size,
        dmas_of_any_size=of_any_size,
        bytes_read=sum(moved[_FROM_HBM]),
        bytes_written=sum(moved[_TO_HBM]),
        vector_spills=spills["vst"],
        scalar_spills=spills["sst"],
        operations=counts,
        path=_read_path(path),
    )


def _read_path(text: str) -> dict[str, float]:
    """Returns the cycles of the critical path by kind. Each line of the dump has the length from it to the end."""
    steps = [(int(length), _kind(name) or "other") for length, name in _STEP.findall(text)]
    path: dict[str, float] = collections.defaultdict(float)
    for (length, kind), (rest, _) in itertools.pairwise([*steps, (0, "")]):
        path[kind] += length - rest
    return dict(path)


@functools.cache
def _kind(name: str) -> str | None:
    return next((kind for kind, pattern in _KINDS if re.match(pattern, name)), None)
