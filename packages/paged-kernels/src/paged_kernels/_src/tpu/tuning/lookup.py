"""The best block sizes known for a shape on a chip."""

import dataclasses
import functools
import json
from importlib import resources
from typing import Literal

from paged_kernels._src.attention.block_sizes import BlockSizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What the best block sizes of a call depend on. Lengths are left out: blocks longer than a sequence are cut."""

    mode: Literal["decode", "prefill"]
    """`decode` where every sequence has one row, `prefill` for all else."""
    q_per_kv: int
    """Query heads for each KV head."""
    kv_heads: int
    head_dim: int
    page_size: int
    kv_dtype: str
    """Type of the pages."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of `data/CHIP.json`: a shape, its best block sizes, and where they come from."""

    shape: Shape
    block_sizes: BlockSizes
    cost: float
    """Of `workload`: cycles where estimated (a page of decode, a call of prefill), microseconds a call where timed."""
    default_cost: float
    """The same with the block sizes that the heuristic would have picked."""
    how: Literal["estimated", "timed"]
    """By the TPU compiler's static model, or on a TPU."""
    workload: str
    """What was compiled or run, as `tools/tpu_cost.py` names it."""
    jax: str
    libtpu: str
    date: str

    @classmethod
    def from_json(cls, fields: dict) -> "Entry":
        """The entry that a line holds.

        Raises:
            TypeError: fields are missing, or unknown.
            ValueError: a block size is below 1.
        """
        nested = {"shape": Shape(**fields["shape"]), "block_sizes": BlockSizes(**fields["block_sizes"])}
        return cls(**{**fields, **nested})


@functools.cache
def entries(chip: str) -> tuple[Entry, ...]:
    """The tuned entries of a chip, by `Chip.name`; empty for a chip that was never tuned for."""
    file = resources.files("paged_kernels._src.tpu.tuning") / "data" / f"{chip}.json"
    if not file.is_file():
        return ()
    return tuple(Entry.from_json(line) for line in json.loads(file.read_text()))


def lookup(chip: str, shape: Shape) -> BlockSizes | None:
    """The best block sizes known for this shape on this chip, None where it was never searched.

    >>> lookup("v6e", Shape(mode="decode", q_per_kv=3, kv_heads=5, head_dim=80, page_size=1, kv_dtype="float32"))
    """
    return next((entry.block_sizes for entry in entries(chip) if entry.shape == shape), None)
