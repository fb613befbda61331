"""From lists of sequences to padded arrays, in a small, fixed set of shapes: the one place that does it."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from paged_kernels import RaggedBatch


@dataclasses.dataclass(frozen=True)
class ScheduledSequence:
    """What one sequence does in a step: its newest `q_len` tokens are computed."""

    page_ids: Sequence[int] | np.ndarray
    """Its pages in order, at least `ceil(kv_len / page_size)` of them."""
    kv_len: int
    """Its tokens, this step's included."""
    q_len: int
    """Tokens of this step, at least 1."""


class StepShape(NamedTuple):
    """What a compiled step depends on, beside the sizes of `BatchShapes`."""

    tokens: int
    """Rows, padding included."""
    max_q_len: int
    """No sequence has more rows than this."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepBatch:
    """A step's arrays. Sequence `i` of the batch is the `i`-th that was given."""

    batch: RaggedBatch
    """Whose rows are whose."""
    positions: Int32[Array, " tokens"]
    """Position of each row in its sequence; 0 on padding."""
    last_rows: Int32[Array, " seqs"]
    """Row of each sequence's newest token, the one to sample from; 0 where there is no sequence."""


@dataclasses.dataclass(frozen=True)
class BatchShapes:
    """The fixed set of shapes that steps are padded to, so that a function of them compiles once a shape.

    A step in which every sequence has one new token (decode) uses `seqs` rows and `max_q_len=1`. Any other uses the
    smallest of `tokens` that holds it. Page tables are always `[seqs, pages_per_seq]`.
    """

    tokens: tuple[int, ...]
    """Row counts of steps that are not decode only, ascending."""
    seqs: int
    """Most sequences in a step."""
    pages_per_seq: int
    """Most pages of a sequence."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", tuple(self.tokens))
        if not self.tokens or any(a >= b for a, b in itertools.pairwise(self.tokens)) or self.tokens[0] < 1:
            raise ValueError(f"tokens={self.tokens} must be ascending row counts of at least 1, such as (64, 256)")
        for name in ("seqs", "pages_per_seq"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def max_tokens(self) -> int:
        """Most tokens that a step which is not decode only can hold."""
        return self.tokens[-1]

    def all_shapes(self) -> list[StepShape]:
        """Every shape that `build` can give; warm them all up and nothing compiles later.

        >>> BatchShapes(tokens=(64, 256), seqs=8, pages_per_seq=4).all_shapes()
        [StepShape(tokens=8, max_q_len=1), StepShape(tokens=64, max_q_len=64), StepShape(tokens=256, max_q_len=256)]
        """
        return [StepShape(self.seqs, 1), *(StepShape(tokens, tokens) for tokens in self.tokens)]

    def warm_up_batch(self, shape: StepShape) -> StepBatch:
        """A step of this shape without any sequence: it reads and writes nothing, so it is safe on a live cache."""
        if shape not in self.all_shapes():
            raise ValueError(f"shape={shape} must be one of all_shapes(): {self.all_shapes()}")
        return _to_device(_Arrays.empty(self, shape), shape)

    def build(self, sequences: Sequence[ScheduledSequence], *, num_pages: int, page_size: int) -> StepBatch:
        """The arrays of a step that computes these sequences, in their order; without any, all of it is padding.

        Args:
            sequences: what each sequence does.
            num_pages: pages of the pool, the null page included.
            page_size: tokens a page holds.

        Raises:
            ValueError: too many sequences, tokens or pages for the shapes; a length or page id that makes no sense;
                or a page that two sequences would write.
        """
        lengths = _Lengths.of(sequences, page_size)
        shape = self._shape_for(lengths.q)
        lengths.check(self.pages_per_seq, page_size)
        arrays = _Arrays.empty(self, shape)
        arrays.fill(sequences, lengths)
        _check_pages(arrays.page_table, lengths, num_pages, page_size)
        return _to_device(arrays, shape)

    def _shape_for(self, q_lens: np.ndarray) -> StepShape:
        if len(q_lens) > self.seqs:
            raise ValueError(f"{len(q_lens)} sequences are more than seqs={self.seqs}; schedule fewer, or raise seqs")
        if (q_lens == 1).all():
            return StepShape(self.seqs, 1)
        total = int(q_lens.sum())
        if total > self.max_tokens:
            raise ValueError(
                f"{total} tokens are more than the largest of tokens={self.tokens}; schedule smaller chunks, "
                "or add a larger size"
            )
        tokens = next(size for size in self.tokens if size >= total)
        return StepShape(tokens, tokens)


class _Lengths(NamedTuple):
    """What the sequences of a step ask for, an entry each."""

    q: np.ndarray
    kv: np.ndarray
    held: np.ndarray  # pages that a sequence brings
    used: np.ndarray  # pages that its tokens take

    @classmethod
    def of(cls, sequences: Sequence[ScheduledSequence], page_size: int) -> "_Lengths":
        n = len(sequences)
        kv = np.fromiter((s.kv_len for s in sequences), np.int32, n)
        return cls(
            q=np.fromiter((s.q_len for s in sequences), np.int32, n),
            kv=kv,
            held=np.fromiter((len(s.page_ids) for s in sequences), np.int32, n),
            used=-(-kv // page_size),
        )

    def check(self, pages_per_seq: int, page_size: int) -> None:
        if (at := _first(self.q < 1)) is not None:
            raise ValueError(f"sequence {at} has q_len={self.q[at]}; it must be at least 1, or leave the sequence out")
        if (at := _first(self.kv < self.q)) is not None:
            raise ValueError(
                f"sequence {at} has kv_len={self.kv[at]}; it must count this step's q_len={self.q[at]} tokens too"
            )
        if (at := _first(self.used > pages_per_seq)) is not None:
            raise ValueError(
                f"sequence {at} with kv_len={self.kv[at]} needs {self.used[at]} pages of {page_size}, more than "
                f"pages_per_seq={pages_per_seq}; end it, or raise pages_per_seq"
            )
        if (at := _first(self.used > self.held)) is not None:
            raise ValueError(
                f"sequence {at} with kv_len={self.kv[at]} needs {self.used[at]} pages of {page_size}, but has "
                f"{self.held[at]}; allocate more before it is scheduled"
            )


class _Arrays(NamedTuple):
    """A step's arrays on the host."""

    page_table: np.ndarray
    kv_lens: np.ndarray
    cu_q_lens: np.ndarray
    num_seqs: np.ndarray
    positions: np.ndarray
    last_rows: np.ndarray

    @classmethod
    def empty(cls, shapes: BatchShapes, shape: StepShape) -> "_Arrays":
        return cls(
            page_table=np.zeros((shapes.seqs, shapes.pages_per_seq), np.int32),
            kv_lens=np.zeros(shapes.seqs, np.int32),
            cu_q_lens=np.zeros(shapes.seqs + 1, np.int32),
            num_seqs=np.zeros((), np.int32),
            positions=np.zeros(shape.tokens, np.int32),
            last_rows=np.zeros(shapes.seqs, np.int32),
        )

    def fill(self, sequences: Sequence[ScheduledSequence], lengths: _Lengths) -> None:
        """Write the sequences into the first rows of each array; their lengths have been checked."""
        n = len(sequences)
        ends = np.cumsum(lengths.q, dtype=np.int32)
        total = int(ends[-1]) if n else 0
        self.num_seqs[...] = n
        self.kv_lens[:n] = lengths.kv
        self.cu_q_lens[1 : n + 1] = ends
        self.cu_q_lens[n + 1 :] = total
        self.last_rows[:n] = ends - 1
        self.positions[:total] = np.repeat(lengths.kv - ends, lengths.q) + np.arange(total, dtype=np.int32)
        for row, sequence, used in zip(self.page_table, sequences, lengths.used.tolist(), strict=False):
            row[:used] = sequence.page_ids[:used]


def _check_pages(table: np.ndarray, lengths: _Lengths, num_pages: int, page_size: int) -> None:
    """Refuse page ids outside the pool, and pages that two sequences (or one twice) would write this step."""
    table = table[: len(lengths.used)]
    page_index = np.arange(table.shape[1])
    in_use = page_index < lengths.used[:, None]
    outside = in_use & ((table < 1) | (table >= num_pages))
    if outside.any():
        at, index = np.argwhere(outside)[0]
        raise ValueError(
            f"sequence {at} has page_ids[{index}]={table[at, index]}; it must lie in 1..{num_pages - 1} "
            "(page 0 is the null page)"
        )
    first_written = (lengths.kv - lengths.q) // page_size
    writes = np.bincount(table[in_use & (page_index >= first_written[:, None])], minlength=1)
    if writes.max() > 1:
        raise ValueError(
            f"page {writes.argmax()} would be written {writes.max()} times in one step; shared pages are read only, "
            "so give each sequence a page of its own for its new tokens"
        )


def _first(wrong: np.ndarray) -> int | None:
    """Index of the first true entry."""
    return int(wrong.argmax()) if wrong.any() else None


def _to_device(arrays: _Arrays, shape: StepShape) -> StepBatch:
    placed: Any = jax.device_put(arrays)
    batch = RaggedBatch(
        page_table=placed.page_table,
        kv_lens=placed.kv_lens,
        cu_q_lens=placed.cu_q_lens,
        num_seqs=placed.num_seqs,
        max_q_len=shape.max_q_len,
    )
    return StepBatch(batch, placed.positions, placed.last_rows)


def stack_batches(batches: Sequence[RaggedBatch]) -> RaggedBatch:
    """One batch for each data group, stacked: every array gets a leading `[groups]` axis.

    Raises:
        ValueError: there is none, or they differ in shapes, `max_q_len`, or which of the optional arrays they have;
            build them with one `BatchShapes`.
    """
    if not batches:
        raise ValueError("batches is empty; give one for each data group")
    kinds = {(batch.max_q_len, *_shapes(batch)) for batch in batches}
    if len(kinds) > 1:
        raise ValueError(
            "batches must agree in max_q_len, in which arrays they have and in their shapes, but have "
            f"{sorted(kinds, key=str)}"
        )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)


def _shapes(batch: RaggedBatch) -> list[tuple[str, tuple[int, ...]]]:
    """The fields that are arrays, and their shapes."""
    return [(jax.tree_util.keystr(path), leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(batch)]
