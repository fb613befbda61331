"""From sequences to a step's arrays, in a small, fixed set of shapes: the one place that does it."""

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
    """What one sequence does in a step: its newest `q_len` tokens are computed."""

    page_ids: Sequence[int] | np.ndarray
    """Its pages in order, at least `ceil(kv_len / page_size)` of them."""
    kv_len: int
    """Its tokens, this step's included."""
    q_len: int
    """Tokens of this step, at least 1."""


@dataclasses.dataclass(frozen=True)
class BatchShapes:
    """The fixed set of shapes that steps are padded to, so that a function of them compiles once a shape.

    A step in which every sequence has one new token (decode) uses `seqs` rows and `max_q_len=1`. Any other uses the
    smallest of `tokens` that holds it. Page tables are always `[groups, seqs, pages_per_seq]`.
    """

    tokens: tuple[int, ...]
    """Row counts of steps that are not decode only, ascending."""
    max_seqs: int
    """Most sequences in a step."""
    pages_per_seq: int
    """Most pages of a sequence."""
    groups: int = 1
    """Groups of layers with page tables of their own (`LayerGroup`)."""
    cross_groups: tuple[int, ...] = ()
    """Which of the groups, by index, are of cross-attention: read only, their keys counted by `cross_tokens`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", tuple(self.tokens))
        object.__setattr__(self, "cross_groups", tuple(self.cross_groups))
        if not self.tokens or any(a >= b for a, b in itertools.pairwise(self.tokens)) or self.tokens[0] < 1:
            raise ValueError(f"tokens={self.tokens} must be ascending row counts of at least 1, such as (64, 256)")
        for name in ("max_seqs", "pages_per_seq", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not set(self.cross_groups) <= set(range(self.groups)):
            raise ValueError(f"cross_groups={self.cross_groups} must lie in 0..{self.groups - 1}, the groups of layers")

    @property
    def max_tokens(self) -> int:
        """Most tokens that a step which is not decode only can hold."""
        return self.tokens[-1]

    @functools.cached_property
    def _layouts(self) -> dict[StepShape, StepLayout]:
        shapes = [StepShape(self.max_seqs, 1), *(StepShape(tokens, tokens) for tokens in self.tokens)]
        sizes = (self.max_seqs, self.pages_per_seq, self.groups, self.cross_groups)
        return {shape: StepLayout(shape, *sizes) for shape in shapes}

    def all_shapes(self) -> list[StepShape]:
        """Every shape that a step can have; warm them all up and nothing compiles later.

        >>> BatchShapes(tokens=(64, 256), max_seqs=8, pages_per_seq=4).all_shapes()
        [StepShape(tokens=8, max_q_len=1), StepShape(tokens=64, max_q_len=64), StepShape(tokens=256, max_q_len=256)]
        """
        return list(self._layouts)

    def shape_for(self, *q_lens: np.ndarray) -> StepShape:
        """The smallest shape that holds a step of sequences with these query lengths, or each of several such steps.

        Replicas run as one, so their steps need one shape: that of all of them.

        >>> shapes = BatchShapes(tokens=(64, 256), max_seqs=8, pages_per_seq=4)
        >>> shapes.shape_for(np.array([1, 1]), np.array([100, 1]))
        StepShape(tokens=256, max_q_len=256)

        Raises:
            ValueError: too many sequences or tokens.
        """
        is_decode = max(each.max(initial=1) for each in q_lens) == 1
        return self._smallest(max(map(len, q_lens)), int(max(each.sum() for each in q_lens)), is_decode)

    def warm_up_batch(self, shape: StepShape) -> StepBatch:
        """A step of this shape without any sequence: it reads and writes nothing, so it is safe on a live cache.

        Raises:
            ValueError: there is no such shape.
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
        """The step that computes these sequences, in their order, on the host: `jax.device_put` sends it.

        The same arguments give the same buffer, bit for bit, so on many hosts every process can pack for itself.

        Args:
            page_tables: int32 `[groups, n, pages_per_seq]`, the pages of each sequence in order
                (`PageManager.page_tables`).
                Pages that are not written in this step may be the null page: those which no query of a group with
                a window sees any more, and those past the sequence's end, which are ignored.
            kv_lens: tokens of each sequence, this step's included, `[n]`.
            q_lens: tokens of each sequence that this step computes, `[n]`, at least 1.
            token_ids: those tokens, one sequence's after another's; `None` leaves zeros.
            num_pages: pages of the pool, the null page included.
            page_size: tokens a page holds.
            cross_tokens: keys that cross-attention of each sequence sees, `[n]`; `None` without cross groups.
            shape: the shape to pad to, for replicas that need the same (`shape_for`); `None` takes the smallest.

        Raises:
            ValueError: an array has the wrong shape or type; too many sequences, tokens or pages for the shapes; a
                length or page id that makes no sense; or a page that would be written twice.
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
        """The step that computes the next tokens of a page manager's sequences, on the host, as `pack`.

        Their pages are copied once, and need no look: the manager gives tokens that are not computed slots in pages
        that nobody else has. Afterwards `manager.commit(seqs, q_lens)`.

        Args:
            manager: its groups and the width of its page tables are those of these shapes.
            seqs: the sequences.
            token_ids: the tokens that are computed, int32, one sequence's after another's; `None` leaves zeros.
            q_lens: how many of each sequence, int32 `[n]`, at least 1; `None`: all that have a slot and are not
                computed.
            shape: as in `pack`.

        Raises:
            ValueError: a sequence does not exist, is swapped out, or has not so many tokens left to compute; too many
                sequences or tokens for the shapes; an array has the wrong shape or type, or the manager has.
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
        """`pack` from a list of sequences, in Python time a sequence; without any, all of the step is padding.

        Args:
            sequences: what each sequence does.
            num_pages: pages of the pool, the null page included.
            page_size: tokens a page holds.
            token_ids: the tokens of this step, one sequence's after another's; `None` leaves zeros.

        Raises:
            ValueError: as `pack`; or a sequence has fewer pages than its tokens take, or has the null page, or there
                is more than one group of layers.
        """
        if self.groups > 1:
            raise ValueError(f"groups={self.groups}, but a scheduled sequence has pages of one group; use pack")
        n = len(sequences)
        kv_lens = np.fromiter((s.kv_len for s in sequences), np.int32, n)
        q_lens = np.fromiter((s.q_len for s in sequences), np.int32, n)
        lengths = StepLengths.of(kv_lens, q_lens)
        lengths.check(self.pages_per_seq, page_size)
        used = lengths.used(page_size)
        _check_held(sequences, kv_lens, used, page_size)
        tables = _page_tables(sequences, used, self.pages_per_seq)
        ids = None if token_ids is None else np.asarray(token_ids, np.int32)
        step = self.pack(tables, kv_lens, q_lens, ids, num_pages=num_pages, page_size=page_size)
        _check_no_null_page(tables, used, num_pages)
        return step

    def _step_of(self, lengths: StepLengths, token_ids: np.ndarray | None, shape: StepShape | None) -> StepBatch:
        """A step with these rows and tokens, whose page tables are not set yet."""
        smallest = self._smallest(len(lengths.q), lengths.rows, lengths.is_decode)
        step = self._empty_step(shape or smallest)
        if shape:
            _check_room(shape, lengths)
        _write_rows(step, lengths)
        if token_ids is not None:
            _check_array("token_ids", token_ids, (lengths.rows,))
            step.array("token_ids")[: len(token_ids)] = token_ids
        return step

    def _empty_step(self, shape: StepShape) -> StepBatch:
        """A step of zeros, whose page tables are not set yet: they are nearly all of the buffer.

        Raises:
            ValueError: there is no such shape.
        """
        layout = self._layouts.get(shape)
        if layout is None:
            raise ValueError(f"shape={shape} must be one of all_shapes(): {self.all_shapes()}")
        buffer = np.empty(layout.size, np.int32)
        buffer[: layout.slices["page_tables"].start] = 0
        return StepBatch(buffer, layout)

    def _smallest(self, seqs: int, rows: int, is_decode: bool) -> StepShape:
        if seqs > self.max_seqs:
            raise ValueError(
                f"{seqs} sequences are more than max_seqs={self.max_seqs}; schedule fewer, or raise max_seqs"
            )
        if is_decode:
            return StepShape(self.max_seqs, 1)
        if rows > self.max_tokens:
            raise ValueError(
                f"{rows} tokens are more than the largest of tokens={self.tokens}; schedule smaller chunks, "
                "or add a larger size"
            )
        tokens = next(size for size in self.tokens if size >= rows)
        return StepShape(tokens, tokens)

    def _check_manager(self, manager: PageManager) -> None:
        """Refuse a manager whose page tables are not those of these shapes."""
        ours = self.groups, self.pages_per_seq, self.cross_groups
        its = len(manager.groups), manager.pages_per_seq, manager.cross_groups
        if ours != its:
            raise ValueError(
                f"manager has groups, pages_per_seq and cross_groups {its}, and these shapes {ours}; make both of the "
                "same sizes"
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
    """Refuse what is no numpy array of int32 and of this shape."""
    if not isinstance(array, np.ndarray) or array.dtype != np.int32 or array.shape != shape:
        got = f"{array.dtype}{list(array.shape)}" if isinstance(array, np.ndarray) else f"a {type(array).__name__}"
        raise ValueError(f"{name} is {got}; it must be a numpy array, int32{list(shape)}")


def _check_left(q_lens: np.ndarray, left: np.ndarray) -> None:
    """Refuse to compute no token of a sequence, or more than have a slot and are not computed."""
    _check_array("q_lens", q_lens, left.shape)
    if least(q_lens, if_none=1) < 1 or most(q_lens - left, if_none=0) > 0:
        at = first_true((q_lens < 1) | (q_lens > left))
        raise ValueError(
            f"sequence {at} computes q_lens={q_lens[at]} tokens; it must be 1..{left[at]}, those that have a slot and "
            "are not computed; extend it first, or leave it out"
        )


def _check_room(shape: StepShape, lengths: StepLengths) -> None:
    """Refuse a shape that does not hold the rows: one that was given."""
    if lengths.rows > shape.tokens or (shape.max_q_len == 1 and not lengths.is_decode):
        raise ValueError(
            f"shape={shape} is too small for {lengths.rows} rows of {len(lengths.q)} sequences; take shape_for(...) of "
            "all steps that run as one"
        )


def _write_rows(step: StepBatch, lengths: StepLengths) -> None:
    """Write whose rows are whose into a step without sequences."""
    n, rows = len(lengths.q), lengths.rows
    starts = step.array("cu_q_lens")
    starts[1 : n + 1] = lengths.ends
    starts[n + 1 :] = rows
    step.array("num_seqs")[...] = n
    step.array("kv_lens")[:n] = lengths.kv
    step.array("last_rows")[:n] = lengths.ends - 1
    step.array("positions")[:rows] = lengths.positions()


def _page_tables(sequences: Sequence[ScheduledSequence], used: np.ndarray, width: int) -> np.ndarray:
    """The pages in use, `[1, n, width]`, of sequences that have enough."""
    tables = np.zeros((1, len(sequences), width), np.int32)
    for row, sequence, count in zip(tables[0], sequences, used.tolist(), strict=True):
        row[:count] = sequence.page_ids[:count]
    return tables


def _check_held(sequences: Sequence[ScheduledSequence], kv_lens: np.ndarray, used: np.ndarray, page_size: int) -> None:
    held = np.fromiter((len(s.page_ids) for s in sequences), np.int32, len(sequences))
    if (at := first_true(used > held)) is not None:
        raise ValueError(
            f"sequence {at} with kv_len={kv_lens[at]} needs {used[at]} pages of {page_size}, but has "
            f"{held[at]}; allocate more before it is scheduled"
        )


def _check_ids(tables: np.ndarray, num_pages: int) -> None:
    """Refuse page ids outside the pool."""
    if tables.view(np.uint32).max() >= num_pages:  # a single pass: as unsigned, what is negative is large
        raise _bad_page(tables, (tables < 0) | (tables >= num_pages), num_pages)


def _check_writes(step: StepBatch, lengths: StepLengths, num_pages: int, page_size: int) -> None:
    """Refuse to write the null page, or a page twice; only the pages that are written are looked at."""
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


def _check_no_null_page(tables: np.ndarray, used: np.ndarray, num_pages: int) -> None:
    null = (tables == 0) & (np.arange(tables.shape[2]) < used[:, None])
    if null.any():
        raise _bad_page(tables, null, num_pages)


def _bad_page(tables: np.ndarray, wrong: np.ndarray, num_pages: int) -> ValueError:
    """What is wrong with the first of these entries."""
    group, at, index = np.argwhere(wrong)[0]
    where = f" of group {group}" if len(tables) > 1 else ""
    return ValueError(
        f"sequence {at} has page_ids[{index}]={tables[group, at, index]}{where}; it must lie in 1..{num_pages - 1} "
        "(page 0 is the null page)"
    )
