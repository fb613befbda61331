"""The arrays of one step in one int32 buffer: one transfer to the device, sliced again inside `jax.jit`."""

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
    """The part of a step's shape that varies. Each shape is compiled once."""

    tokens: int
    """Rows, including padding."""
    max_q_len: int
    """The most rows of one sequence."""


@dataclasses.dataclass(frozen=True)
class StepLayout:
    """The place of each array in a step's buffer. They lie one after another, page tables last.

        num_seqs | kv_lens | cu_q_lens | last_rows | cross_tokens | positions | token_ids | page_tables
        1          S         S + 1       S           S or 0         tokens      tokens      groups * S * pages_per_seq

    with `S = max_seqs`.

    >>> StepLayout(StepShape(tokens=8, max_q_len=8), max_seqs=2, pages_per_seq=3).slices["page_tables"]
    slice(24, 30, None)
    """

    shape: StepShape
    """Rows of the step."""
    max_seqs: int
    """The most sequences."""
    pages_per_seq: int
    """Length of a page table."""
    groups: int = 1
    """Number of layer groups; each has its own page tables."""
    cross_groups: tuple[int, ...] = ()
    """Indices of the cross-attention groups. Without any, `cross_tokens` is empty."""

    @functools.cached_property
    def array_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each array, in the order of the buffer."""
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
        """The slice of the buffer that holds each array."""
        ends = itertools.accumulate(map(math.prod, self.array_shapes.values()), initial=0)
        return dict(zip(self.array_shapes, itertools.starmap(slice, itertools.pairwise(ends)), strict=True))

    @property
    def size(self) -> int:
        """Length of the buffer."""
        return self.slices["page_tables"].stop


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepBatch:
    """One step: its sequences, rows and page tables, in one buffer. The sequences are in the order given.

    The buffer is its only pytree leaf: a numpy array from `BatchShapes.pack`, or a device array after `jax.device_put`.
    So a step is one transfer. The arrays are static slices of the buffer. Take them inside `jax.jit`, where all slices
    together cost at most one copy. In eager code each slice is a call; on the host it is a view. A stacked step
    (`stack_batches`) has stacked arrays.
    """

    buffer: Int32[Array | np.ndarray, "*replicas size"]
    """All arrays of the step, in the order of `layout`."""
    layout: StepLayout = dataclasses.field(metadata={"static": True})
    """The place of each array."""

    @property
    def batch(self) -> RaggedBatch:
        """The batch for the first layer group."""
        return self.group(0)

    def group(self, index: int) -> RaggedBatch:
        """The batch for one layer group. Only the page tables differ between groups.

        For a cross-attention group the keys are not the sequence's own tokens. So `kv_lens` holds the `cross_tokens`,
        `q_starts` gives the position of each sequence's first row, and the step writes nothing. Attend with
        `AttentionSpec(causal=False)`.

        Raises:
            ValueError: `index` is not a group.
        """
        if not 0 <= index < self.layout.groups:
            raise ValueError(f"index={index} must lie in 0..{self.layout.groups - 1}, the layer groups")
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
        """The position of each row in its sequence; 0 for padding."""
        return self.array("positions")

    @property
    def token_ids(self) -> Int32[Array, "*replicas tokens"]:
        """The token id of each row; 0 for padding, and everywhere if the step was packed without token ids."""
        return self.array("token_ids")

    @property
    def last_rows(self) -> Int32[Array, "*replicas seqs"]:
        """The row of each sequence's newest token, the row to sample from; 0 where there is no sequence."""
        return self.array("last_rows")

    def array(self, name: str) -> Any:  # a numpy or a jax array, like the buffer
        """The array with this name in `layout`. On the host it is a view: writes go to the buffer."""
        part, shape = self.buffer[..., self.layout.slices[name]], self.layout.array_shapes[name]
        return part if len(shape) == 1 else part.reshape(self.buffer.shape[:-1] + shape)


def stack_batches(batches: Sequence[Batch]) -> Batch:
    """Stack the batches of all replicas: every array gets a leading `[replicas]` axis.

    Batches on the host stay there, so that the steps of all replicas can be sent by one
    `jax.device_put(stack_batches(steps), NamedSharding(mesh, PartitionSpec("dp")))`.

    Raises:
        ValueError: there are no batches, or they differ in shapes, `max_q_len`, layout or optional arrays. Build them
            with one `BatchShapes`, and steps with one `shape`.
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
    """Name and shape of each array."""
    return [(jax.tree_util.keystr(path), leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(batch)]


def _stack(*leaves: Array | np.ndarray) -> Array | np.ndarray:
    on_host = all(isinstance(leaf, np.ndarray) for leaf in leaves)
    return np.stack(leaves) if on_host else jnp.stack(leaves)
