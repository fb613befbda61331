"""From lists of sequences to padded arrays, in a small, fixed set of shapes: the one place that does it."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

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
        q_lens = np.fromiter((s.q_len for s in sequences), np.int32, len(sequences))
        kv_lens = np.fromiter((s.kv_len for s in sequences), np.int32, len(sequences))
        held = np.fromiter((len(s.page_ids) for s in sequences), np.int32, len(sequences))
        used = -(-kv_lens // page_size)
        shape = self._shape_for(q_lens)
        self._check_lengths(q_lens, kv_lens, held, used, page_size)
        arrays = _Arrays.empty(self, shape)
        arrays.fill(sequences, q_lens, kv_lens, used)
        _check_pages(arrays.page_table, q_lens, kv_lens, used, num_pages, page_size)
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

    def _check_lengths(
        self, q_lens: np.ndarray, kv_lens: np.ndarray, held: np.ndarray, used: np.ndarray, page_size: int
    ) -> None:
        if (at := _first(q_lens < 1)) is not None:
            raise ValueError(f"sequence {at} has q_len={q_lens[at]}; it must be at least 1, or leave the sequence out")
        if (at := _first(kv_lens < q_lens)) is not None:
            raise ValueError(
                f"sequence {at} has kv_len={kv_lens[at]}; it must count this step's q_len={q_lens[at]} tokens too"
            )
        if (at := _first(used > self.pages_per_seq)) is not None:
            raise ValueError(
                f"sequence {at} with kv_len={kv_lens[at]} needs {used[at]} pages of {page_size}, more than "
                f"pages_per_seq={self.pages_per_seq}; end it, or raise pages_per_seq"
            )
        if (at := _first(used > held)) is not None:
            raise ValueError(
                f"sequence {at} with kv_len={kv_lens[at]} needs {used[at]} pages of {page_size}, but has {held[at]}; "
                "allocate more before it is scheduled"
            )


@dataclasses.dataclass(frozen=True)
class _Arrays:
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

    def fill(
        self, sequences: Sequence[ScheduledSequence], q_lens: np.ndarray, kv_lens: np.ndarray, used: np.ndarray
    ) -> None:
        """Write the sequences into the first rows of each array; lengths have been checked."""
        n = len(sequences)
        ends = np.cumsum(q_lens, dtype=np.int32)
        total = int(ends[-1]) if n else 0
        self.num_seqs[...] = n
        self.kv_lens[:n] = kv_lens
        self.cu_q_lens[1 : n + 1] = ends
        self.cu_q_lens[n + 1 :] = total
        self.last_rows[:n] = ends - 1
        self.positions[:total] = np.repeat(kv_lens - ends, q_lens) + np.arange(total, dtype=np.int32)
        for row, sequence, count in zip(self.page_table, sequences, used.tolist(), strict=False):
            row[:count] = sequence.page_ids[:count]


def _check_pages(
    table: np.ndarray, q_lens: np.ndarray, kv_lens: np.ndarray, used: np.ndarray, num_pages: int, page_size: int
) -> None:
    """Refuse page ids outside the pool, and pages that two sequences (or one twice) would write this step."""
    table = table[: len(used)]
    page_index = np.arange(table.shape[1])
    in_use = page_index < used[:, None]
    outside = in_use & ((table < 1) | (table >= num_pages))
    if outside.any():
        at, index = np.argwhere(outside)[0]
        raise ValueError(
            f"sequence {at} has page_ids[{index}]={table[at, index]}; it must lie in 1..{num_pages - 1} "
            "(page 0 is the null page)"
        )
    first_written = (kv_lens - q_lens) // page_size
    written = table[in_use & (page_index >= first_written[:, None])]
    counts = np.bincount(written, minlength=1)
    if (counts > 1).any():
        raise ValueError(
            f"page {int(counts.argmax())} would be written {counts.max()} times in one step; shared pages are read "
            "only, so give each sequence a page of its own for its new tokens"
        )


def _first(wrong: np.ndarray) -> int | None:
    """Index of the first true entry."""
    return int(wrong.argmax()) if wrong.any() else None


def _to_device(arrays: _Arrays, shape: StepShape) -> StepBatch:
    batch = RaggedBatch(
        page_table=arrays.page_table,
        kv_lens=arrays.kv_lens,
        cu_q_lens=arrays.cu_q_lens,
        num_seqs=arrays.num_seqs,
        max_q_len=shape.max_q_len,
    )
    return jax.device_put(StepBatch(batch, arrays.positions, arrays.last_rows))


def stack_batches(batches: Sequence[RaggedBatch]) -> RaggedBatch:
    """One batch for each data group, stacked: every array gets a leading `[groups]` axis.

    Raises:
        ValueError: there is none, or their shapes or `max_q_len` differ; build them with one `BatchShapes`.
    """
    if not batches:
        raise ValueError("batches is empty; give one for each data group")
    kinds = {(batch.page_table.shape, batch.max_q_len) for batch in batches}
    if len(kinds) > 1:
        raise ValueError(f"batches must agree in page_table.shape and max_q_len, but have {sorted(kinds, key=str)}")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
