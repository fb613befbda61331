"""The best known block sizes for a shape on a chip."""

import dataclasses
import functools
import json
from importlib import resources
from typing import Literal

from paged_kernels._src.attention.block_sizes import BlockSizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What the best block sizes of a call depend on.

    Lengths are not part of it: blocks longer than a sequence are shortened.
    """

    mode: Literal["decode", "prefill"]
    """`decode` if every sequence has one row, `prefill` otherwise."""
    q_per_kv: int
    """Query heads per KV head."""
    kv_heads: int
    head_dim: int
    page_size: int
    kv_dtype: str
    """The type of the pages."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of `data/CHIP.json`: a shape, its best block sizes, and how they were found."""

    shape: Shape
    block_sizes: BlockSizes
    cost: float
    """The cost of `workload`. If estimated, in cycles: per page for decode, per call for prefill. If timed, in
    microseconds per call."""
    default_cost: float
    """The same cost with the default block sizes."""
    how: Literal["estimated", "timed"]
    """Estimated by the TPU compiler's static model, or timed on a TPU."""
    workload: str
    """What was compiled or run, by its name in `tools/tpu_cost.py`."""
    jax: str
    libtpu: str
    date: str

    @classmethod
    def from_json(cls, fields: dict) -> "Entry":
        """Returns the entry of one line.

        Raises:
            TypeError: fields are missing or unknown.
            ValueError: a block size is below 1.
        """
        nested = {"shape": Shape(**fields["shape"]), "block_sizes": BlockSizes(**fields["block_sizes"])}
        return cls(**{**fields, **nested})


@functools.cache
def entries(chip: str) -> tuple[Entry, ...]:
    """Returns the tuned entries of a chip, by `Chip.name`; empty for a chip that was never tuned."""
    file = resources.files("paged_kernels._src.tpu.tuning") / "data" / f"{chip}.json"
    if not file.is_file():
        return ()
    return tuple(Entry.from_json(line) for line in json.loads(file.read_text()))


def lookup(chip: str, shape: Shape) -> BlockSizes | None:
    """Returns the best known block sizes for this shape on this chip; None if it was never tuned.

    >>> lookup("v6e", Shape(mode="decode", q_per_kv=3, kv_heads=5, head_dim=80, page_size=1, kv_dtype="float32"))
    """
    return next((entry.block_sizes for entry in entries(chip) if entry.shape == shape), None)
