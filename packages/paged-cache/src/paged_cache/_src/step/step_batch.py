"""One step's arrays in one int32 buffer: sent to the device in one transfer, cut up again inside `jax.jit`."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from paged_kernels import RaggedBatch

Batch = TypeVar("Batch", RaggedBatch, "StepBatch")


class StepShape(NamedTuple):
    """What a compiled step depends on, beside the sizes of `BatchShapes`."""

    tokens: int
    """Rows, padding included."""
    max_q_len: int
    """No sequence has more rows than this."""


@dataclasses.dataclass(frozen=True)
class StepLayout:
    """Where each array of a step lies in its buffer: one after the other, page tables last.

        num_seqs | kv_lens | cu_q_lens | last_rows | cross_tokens | positions | token_ids | page_tables
        1          seqs      seqs + 1    seqs        seqs or 0      tokens      tokens      groups * seqs * pages

    >>> StepLayout(StepShape(tokens=8, max_q_len=8), max_seqs=2, pages_per_seq=3).slices["page_tables"]
    slice(24, 30, None)
    """

    shape: StepShape
    """Rows of the step."""
    max_seqs: int
    """Sequence slots."""
    pages_per_seq: int
    """Width of a page table."""
    groups: int = 1
    """Groups of layers, a page table each."""
    cross_groups: tuple[int, ...] = ()
    """Which of them are of cross-attention; without any, there are no `cross_tokens`."""

    @functools.cached_property
    def array_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each array, in the buffer's order."""
        return {
            "num_seqs": (),
            "kv_lens": (self.max_seqs,),
            "cu_q_lens": (self.max_seqs + 1,),
            "last_rows": (self.max_seqs,),
            "cross_tokens": (self.max_seqs if self.cross_groups else 0,),
            "positions": (self.shape.tokens,),
            "token_ids": (self.shape.tokens,),
            "page_tables": (self.groups, self.max_seqs, self.pages_per_seq),
        }

    @functools.cached_property
    def slices(self) -> dict[str, slice]:
        """The part of the buffer that each array takes."""
        ends = itertools.accumulate(map(math.prod, self.array_shapes.values()), initial=0)
        return dict(zip(self.array_shapes, itertools.starmap(slice, itertools.pairwise(ends)), strict=True))

    @property
    def size(self) -> int:
        """Length of the buffer."""
        return self.slices["page_tables"].stop


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepBatch:
    """A step: who computes which rows, in one buffer. Sequence `i` of it is the `i`-th that was given.

    Its only leaf is the buffer, on the host (from `BatchShapes.pack`) or on a device (from `jax.device_put` of that),
    so that a step is one transfer. The arrays are static slices of it: cut them inside `jax.jit`, where all of them
    cost at most one copy of the buffer; in eager code each is a call of its own, on the host a view. A stacked step
    (`stack_batches`) has stacked arrays.
    """

    buffer: Int32[Array | np.ndarray, "*replicas size"]
    """All arrays of the step, as `layout` says."""
    layout: StepLayout = dataclasses.field(metadata={"static": True})
    """Where each array lies."""

    @property
    def batch(self) -> RaggedBatch:
        """Whose rows are whose, with the page tables of the first group of layers."""
        return self.group(0)

    def group(self, index: int) -> RaggedBatch:
        """Whose rows are whose, with the page tables of this group of layers; the rest is the same for all.

        But the keys of cross-attention are not the sequence's own tokens: there `kv_lens` counts the `cross_tokens`,
        `q_starts` places the rows, and nothing can be written. Attend with `AttentionSpec(causal=False)`.

        Raises:
            ValueError: there is no such group.
        """
        if not 0 <= index < self.layout.groups:
            raise ValueError(f"index={index} must lie in 0..{self.layout.groups - 1}, the groups of layers")
        starts, kv_lens = self.array("cu_q_lens"), self.array("kv_lens")
        is_cross = index in self.layout.cross_groups
        return RaggedBatch(
            page_table=self.array("page_tables")[..., index, :, :],
            kv_lens=self.array("cross_tokens") if is_cross else kv_lens,
            cu_q_lens=starts,
            num_seqs=self.array("num_seqs"),
            max_q_len=self.layout.shape.max_q_len,
            q_starts=kv_lens - (starts[..., 1:] - starts[..., :-1]) if is_cross else None,
        )

    @property
    def positions(self) -> Int32[Array, "*replicas tokens"]:
        """Position of each row in its sequence; 0 on padding."""
        return self.array("positions")

    @property
    def token_ids(self) -> Int32[Array, "*replicas tokens"]:
        """Token of each row; 0 on padding, and everywhere when the step was packed without."""
        return self.array("token_ids")

    @property
    def last_rows(self) -> Int32[Array, "*replicas seqs"]:
        """Row of each sequence's newest token, the one to sample from; 0 where there is no sequence."""
        return self.array("last_rows")

    def array(self, name: str) -> Any:  # numpy's or jax's array, as the buffer
        """The array of this name in `layout`; of a buffer on the host, a view that writes through."""
        part, shape = self.buffer[..., self.layout.slices[name]], self.layout.array_shapes[name]
        return part if len(shape) == 1 else part.reshape(self.buffer.shape[:-1] + shape)


def stack_batches(batches: Sequence[Batch]) -> Batch:
    """One batch for each replica, stacked: every array gets a leading `[groups]` axis.

    Batches on the host stay there, so that all groups' steps can be placed by one
    `jax.device_put(stack_batches(steps), NamedSharding(mesh, PartitionSpec("dp")))`.

    Raises:
        ValueError: there is none, or they differ in shapes, `max_q_len`, layout, or which of the optional arrays they
            have; build them with one `BatchShapes`, and steps with one `shape`.
    """
    if not batches:
        raise ValueError("batches is empty; give one for each replica")
    kinds = {(_static_part(batch), *_shapes(batch)) for batch in batches}
    if len(kinds) > 1:
        raise ValueError(
            "batches must agree in max_q_len, in which arrays they have and in their shapes, but have "
            f"{sorted(kinds, key=str)}"
        )
    return jax.tree.map(_stack, *batches)


def _static_part(batch: RaggedBatch | StepBatch) -> StepLayout | int | None:
    return batch.layout if isinstance(batch, StepBatch) else batch.max_q_len


def _shapes(batch: RaggedBatch | StepBatch) -> list[tuple[str, tuple[int, ...]]]:
    """The fields that are arrays, and their shapes."""
    return [(jax.tree_util.keystr(path), leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(batch)]


def _stack(*leaves: Array | np.ndarray) -> Array | np.ndarray:
    on_host = all(isinstance(leaf, np.ndarray) for leaf in leaves)
    return np.stack(leaves) if on_host else jnp.stack(leaves)
