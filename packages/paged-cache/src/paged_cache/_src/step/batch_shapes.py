"""Packs the sequences of a step into arrays of a few fixed shapes."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from paged_cache._src.manager import PageManager
from paged_cache._src.manager.arrays import first_true, least, most
from paged_cache._src.step.step_batch import StepBatch, StepLayout, StepShape
from paged_cache._src.step.step_lengths import StepLengths


@dataclasses.dataclass(frozen=True)
class ScheduledSequence:
    """One sequence of a step, which computes its newest `q_len` tokens."""

    page_ids: Sequence[int] | np.ndarray
    """Its pages in order, at least `ceil(kv_len / page_size)`."""
    kv_len: int
    """All its tokens, including those of this step."""
    q_len: int
    """Tokens of this step, at least 1."""


@dataclasses.dataclass(frozen=True)
class BatchShapes:
    """The shapes that steps are padded to. A compiled function of a step is compiled once per shape.

    A decode step (every sequence computes one token) has `max_seqs` rows and `max_q_len=1`. Any other step has the
    smallest of `tokens` that fits. Page tables are always `[groups, max_seqs, pages_per_seq]`.
    """

    tokens: tuple[int, ...]
    """Numbers of rows of steps that are not decode steps, ascending."""
    max_seqs: int
    """The most sequences in a step."""
    pages_per_seq: int
    """The most pages of a sequence."""
    groups: int = 1
    """Number of layer groups; each has its own page tables (`LayerGroup`)."""
    cross_groups: tuple[int, ...] = ()
    """Indices of the cross-attention groups. Steps only read their pages; `cross_tokens` counts their keys."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", tuple(self.tokens))
        object.__setattr__(self, "cross_groups", tuple(self.cross_groups))
        if not self.tokens or any(a >= b for a, b in itertools.pairwise(self.tokens)) or self.tokens[0] < 1:
            raise ValueError(f"tokens={self.tokens} must be ascending row counts of at least 1, such as (64, 256)")
        for name in ("max_seqs", "pages_per_seq", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not set(self.cross_groups) <= set(range(self.groups)):
            raise ValueError(f"cross_groups={self.cross_groups} must lie in 0..{self.groups - 1}, the layer groups")

    @property
    def max_tokens(self) -> int:
        """The most tokens of a step that is not a decode step."""
        return self.tokens[-1]

    @functools.cached_property
    def _layouts(self) -> dict[StepShape, StepLayout]:
        shapes = [StepShape(self.max_seqs, 1), *(StepShape(tokens, tokens) for tokens in self.tokens)]
        sizes = (self.max_seqs, self.pages_per_seq, self.groups, self.cross_groups)
        return {shape: StepLayout(shape, *sizes) for shape in shapes}

    def all_shapes(self) -> list[StepShape]:
        """All shapes that a step can have. Warm them all up, and nothing compiles later.

        >>> BatchShapes(tokens=(64, 256), max_seqs=8, pages_per_seq=4).all_shapes()
        [StepShape(tokens=8, max_q_len=1), StepShape(tokens=64, max_q_len=64), StepShape(tokens=256, max_q_len=256)]
        """
        return list(self._layouts)

    def shape_for(self, *q_lens: np.ndarray) -> StepShape:
        """The smallest shape that fits a step with these query lengths; with several arguments, every one of the steps.

        Replicas run together, so their steps need the same shape.

        >>> shapes = BatchShapes(tokens=(64, 256), max_seqs=8, pages_per_seq=4)
        >>> shapes.shape_for(np.array([1, 1]), np.array([100, 1]))
        StepShape(tokens=256, max_q_len=256)

        Raises:
            ValueError: too many sequences or tokens.
        """
        is_decode = max(each.max(initial=1) for each in q_lens) == 1
        return self._smallest(max(map(len, q_lens)), int(max(each.sum() for each in q_lens)), is_decode)

    def warm_up_batch(self, shape: StepShape) -> StepBatch:
        """A step of this shape without sequences. It reads and writes no page, so it is safe on a live cache.

        Raises:
            ValueError: `shape` is not one of `all_shapes()`.
        """
        step = self._empty_step(shape)
        step.array("page_tables")[...] = 0
        return step

    def pack(
        self,
        page_tables: np.ndarray,
        kv_lens: np.ndarray,
        q_lens: np.ndarray,
        token_ids: np.ndarray | None = None,
        *,
        num_pages: int,
        page_size: int,
        cross_tokens: np.ndarray | None = None,
        shape: StepShape | None = None,
    ) -> StepBatch:
        """Pack the step that computes these sequences. It is on the host; `jax.device_put` sends it to the devices.

        Equal arguments give equal buffers, bit for bit. So each process of many hosts can pack its own copy.

        Args:
            page_tables: int32 `[groups, n, pages_per_seq]`, the pages of each sequence in order
                (`PageManager.page_tables`). Entries may be the null page where the step does not write: pages that a
                window has released, and entries past the sequence's end, which are ignored.
            kv_lens: int32 `[n]`, all tokens of each sequence, including those of this step.
            q_lens: int32 `[n]`, tokens of each sequence that this step computes, at least 1.
            token_ids: int32, the tokens of this step, one sequence after another; `None` leaves zeros.
            num_pages: pages of the pool, including the null page.
            page_size: tokens per page.
            cross_tokens: int32 `[n]`, keys that cross-attention of each sequence sees; `None` without cross groups.
            shape: the shape to pad to, if replicas need the same (`shape_for`); `None` takes the smallest.

        Raises:
            ValueError: an array has the wrong shape or type; there are too many sequences, tokens or pages; a length
                or a page id is impossible; or a page would be written twice.
        """
        n = np.size(kv_lens)
        _check_array("kv_lens", kv_lens, (n,))
        _check_array("q_lens", q_lens, (n,))
        _check_array("page_tables", page_tables, (self.groups, n, self.pages_per_seq))
        lengths = StepLengths.of(kv_lens, q_lens)
        lengths.check(self.pages_per_seq, page_size)
        step = self._step_of(lengths, token_ids, shape)
        self._write_cross_tokens(step, cross_tokens, n, page_size)
        tables = step.array("page_tables")
        tables[:, :n], tables[:, n:] = page_tables, 0
        _check_ids(tables, num_pages)
        _check_writes(step, lengths, num_pages, page_size)
        return step

    def pack_seqs(
        self,
        manager: PageManager,
        seqs: ArrayLike,
        token_ids: np.ndarray | None = None,
        *,
        q_lens: np.ndarray | None = None,
        shape: StepShape | None = None,
    ) -> StepBatch:
        """Pack the step that computes the next tokens of a page manager's sequences; on the host, as `pack`.

        The page tables are copied once and not checked: the manager writes only to private pages. After the step, call
        `manager.commit(seqs, q_lens)`.

        Args:
            manager: a manager with the same groups and the same `pages_per_seq` as these shapes.
            seqs: the sequences.
            token_ids: int32, the tokens of this step, one sequence after another; `None` leaves zeros.
            q_lens: int32 `[n]`, tokens of each sequence to compute, at least 1; `None`: all tokens that have a slot
                and are not computed.
            shape: as in `pack`.

        Raises:
            ValueError: a sequence does not exist, is swapped out, or has fewer tokens left to compute; there are too
                many sequences or tokens; an array has the wrong shape or type; or the manager has other sizes.
        """
        self._check_manager(manager)
        computed = manager.computed(seqs)
        left = manager.lengths(seqs) - computed
        if q_lens is None:
            q_lens = left
        _check_left(q_lens, left)
        lengths = StepLengths.of(computed + q_lens, q_lens)
        step = self._step_of(lengths, token_ids, shape)
        if self.cross_groups:
            step.array("cross_tokens")[: len(left)] = manager.cross_tokens(seqs)
        tables = step.array("page_tables")
        manager.page_tables(seqs, out=tables[:, : len(left)])
        tables[:, len(left) :] = 0
        return step

    def build(
        self,
        sequences: Sequence[ScheduledSequence],
        *,
        num_pages: int,
        page_size: int,
        token_ids: Sequence[int] | np.ndarray | None = None,
    ) -> StepBatch:
        """Pack a step from a list of sequences. Slower than `pack`: a Python loop. An empty list gives only padding.

        Args:
            sequences: the sequences of the step, in order.
            num_pages: pages of the pool, including the null page.
            page_size: tokens per page.
            token_ids: the tokens of this step, one sequence after another; `None` leaves zeros.

        Raises:
            ValueError: as `pack`; or a sequence has too few pages or the null page; or there are several layer groups.
        """
        if self.groups > 1:
            raise ValueError(f"groups={self.groups}, but a ScheduledSequence has pages of one group; use pack")
        n = len(sequences)
        kv_lens = np.fromiter((s.kv_len for s in sequences), np.int32, n)
        q_lens = np.fromiter((s.q_len for s in sequences), np.int32, n)
        lengths = StepLengths.of(kv_lens, q_lens)
        lengths.check(self.pages_per_seq, page_size)
        num_pages_of = lengths.num_pages(page_size)
        _check_page_ids(sequences, kv_lens, num_pages_of, page_size)
        tables = _page_tables(sequences, num_pages_of, self.pages_per_seq)
        ids = None if token_ids is None else np.asarray(token_ids, np.int32)
        step = self.pack(tables, kv_lens, q_lens, ids, num_pages=num_pages, page_size=page_size)
        _check_no_null_page(tables, num_pages_of, num_pages)
        return step

    def _step_of(self, lengths: StepLengths, token_ids: np.ndarray | None, shape: StepShape | None) -> StepBatch:
        """A step with these lengths and tokens; the caller sets its page tables."""
        smallest = self._smallest(len(lengths.q), lengths.num_tokens, lengths.is_decode)
        step = self._empty_step(shape or smallest)
        if shape:
            _check_room(shape, lengths)
        _write_lengths(step, lengths)
        if token_ids is not None:
            _check_array("token_ids", token_ids, (lengths.num_tokens,))
            step.array("token_ids")[: len(token_ids)] = token_ids
        return step

    def _empty_step(self, shape: StepShape) -> StepBatch:
        """A step of zeros; the caller sets its page tables, which take most of the buffer.

        Raises:
            ValueError: `shape` is not one of `all_shapes()`.
        """
        layout = self._layouts.get(shape)
        if layout is None:
            raise ValueError(f"shape={shape} must be one of all_shapes(): {self.all_shapes()}")
        buffer = np.empty(layout.size, np.int32)
        buffer[: layout.slices["page_tables"].start] = 0
        return StepBatch(buffer, layout)

    def _smallest(self, seqs: int, num_tokens: int, is_decode: bool) -> StepShape:
        if seqs > self.max_seqs:
            raise ValueError(
                f"{seqs} sequences are more than max_seqs={self.max_seqs}; schedule fewer, or raise max_seqs"
            )
        if is_decode:
            return StepShape(self.max_seqs, 1)
        if num_tokens > self.max_tokens:
            raise ValueError(
                f"{num_tokens} tokens are more than the largest of tokens={self.tokens}; schedule smaller chunks, "
                "or add a larger size"
            )
        tokens = next(size for size in self.tokens if size >= num_tokens)
        return StepShape(tokens, tokens)

    def _check_manager(self, manager: PageManager) -> None:
        """Check that the manager has page tables of the same sizes."""
        ours = self.groups, self.pages_per_seq, self.cross_groups
        its = len(manager.groups), manager.pages_per_seq, manager.cross_groups
        if ours != its:
            raise ValueError(
                f"manager has groups, pages_per_seq and cross_groups {its}, but these shapes have {ours}; make both "
                "of the same sizes"
            )

    def _write_cross_tokens(self, step: StepBatch, cross_tokens: np.ndarray | None, n: int, page_size: int) -> None:
        if (cross_tokens is None) == bool(self.cross_groups):
            needs = "None" if cross_tokens is not None else "given, int32 [n]"
            raise ValueError(f"cross_tokens must be {needs}, as cross_groups={self.cross_groups}")
        if cross_tokens is None:
            return
        _check_array("cross_tokens", cross_tokens, (n,))
        room = self.pages_per_seq * page_size
        if (at := first_true((cross_tokens < 0) | (cross_tokens > room))) is not None:
            raise ValueError(
                f"cross_tokens[{at}]={cross_tokens[at]} must lie in 0..{room}, what {self.pages_per_seq} pages hold"
            )
        step.array("cross_tokens")[:n] = cross_tokens


def _check_array(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    """Check that `array` is a numpy array of int32 with this shape."""
    if not isinstance(array, np.ndarray) or array.dtype != np.int32 or array.shape != shape:
        got = f"{array.dtype}{list(array.shape)}" if isinstance(array, np.ndarray) else f"a {type(array).__name__}"
        raise ValueError(f"{name} is {got}; it must be a numpy array, int32{list(shape)}")


def _check_left(q_lens: np.ndarray, left: np.ndarray) -> None:
    """Check that each sequence computes at least 1 token and at most those that are left."""
    _check_array("q_lens", q_lens, left.shape)
    if least(q_lens, if_none=1) < 1 or most(q_lens - left, if_none=0) > 0:
        at = first_true((q_lens < 1) | (q_lens > left))
        raise ValueError(
            f"sequence {at} computes q_lens={q_lens[at]} tokens; it must be 1..{left[at]}, those that have a slot and "
            "are not computed; extend it first, or leave it out"
        )


def _check_room(shape: StepShape, lengths: StepLengths) -> None:
    """Check that a given shape fits the step."""
    if lengths.num_tokens > shape.tokens or (shape.max_q_len == 1 and not lengths.is_decode):
        raise ValueError(
            f"shape={shape} is too small for {lengths.num_tokens} rows of {len(lengths.q)} sequences; take "
            "shape_for(...) of all steps that run together"
        )


def _write_lengths(step: StepBatch, lengths: StepLengths) -> None:
    """Write the lengths and positions into an empty step."""
    n, num_tokens = len(lengths.q), lengths.num_tokens
    starts = step.array("cu_q_lens")
    starts[1 : n + 1] = lengths.ends
    starts[n + 1 :] = num_tokens
    step.array("num_seqs")[...] = n
    step.array("kv_lens")[:n] = lengths.kv
    step.array("last_rows")[:n] = lengths.ends - 1
    step.array("positions")[:num_tokens] = lengths.positions()


def _page_tables(sequences: Sequence[ScheduledSequence], num_pages_of: np.ndarray, width: int) -> np.ndarray:
    """The page tables `[1, n, width]`, with the pages that the sequences need."""
    tables = np.zeros((1, len(sequences), width), np.int32)
    for table, sequence, count in zip(tables[0], sequences, num_pages_of.tolist(), strict=True):
        table[:count] = sequence.page_ids[:count]
    return tables


def _check_page_ids(
    sequences: Sequence[ScheduledSequence], kv_lens: np.ndarray, num_pages_of: np.ndarray, page_size: int
) -> None:
    """Check that each sequence has enough pages."""
    given = np.fromiter((len(s.page_ids) for s in sequences), np.int32, len(sequences))
    if (at := first_true(num_pages_of > given)) is not None:
        raise ValueError(
            f"sequence {at} with kv_len={kv_lens[at]} needs {num_pages_of[at]} pages of {page_size}, but has "
            f"{given[at]}; allocate more before it is scheduled"
        )


def _check_ids(tables: np.ndarray, num_pages: int) -> None:
    """Check that all page ids lie in the pool."""
    if tables.view(np.uint32).max() >= num_pages:  # one pass: a negative id is large as an unsigned number
        raise _bad_page(tables, (tables < 0) | (tables >= num_pages), num_pages)


def _check_writes(step: StepBatch, lengths: StepLengths, num_pages: int, page_size: int) -> None:
    """Check that the step writes neither the null page nor a page twice. Looks only at pages that it writes."""
    layout, tables = step.layout, step.array("page_tables")
    entries = lengths.written_entries(layout.pages_per_seq, page_size)
    written = tables.reshape(layout.groups, -1).take(entries, axis=1)
    if layout.cross_groups:
        written = np.delete(written, layout.cross_groups, axis=0)
    written = np.sort(written, axis=None)
    if written.size and written[0] == 0:
        null = np.zeros(tables.shape, bool)
        null.reshape(layout.groups, -1)[:, entries] = True
        null[list(layout.cross_groups)] = False
        raise _bad_page(tables, null & (tables == 0), num_pages)
    if (at := first_true(written[1:] == written[:-1])) is not None:
        page = written[at]
        raise ValueError(
            f"page {page} would be written {(written == page).sum()} times in one step; shared pages are read only, "
            "so give each sequence a page of its own for its new tokens"
        )


def _check_no_null_page(tables: np.ndarray, num_pages_of: np.ndarray, num_pages: int) -> None:
    """Check that no sequence uses the null page."""
    null = (tables == 0) & (np.arange(tables.shape[2]) < num_pages_of[:, None])
    if null.any():
        raise _bad_page(tables, null, num_pages)


def _bad_page(tables: np.ndarray, wrong: np.ndarray, num_pages: int) -> ValueError:
    """The error for the first wrong entry of the page tables."""
    group, at, index = np.argwhere(wrong)[0]
    where = f" of group {group}" if len(tables) > 1 else ""
    return ValueError(
        f"sequence {at} has page_ids[{index}]={tables[group, at, index]}{where}; it must lie in 1..{num_pages - 1} "
        "(page 0 is the null page)"
    )
