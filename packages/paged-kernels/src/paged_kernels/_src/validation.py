"""Checks of arguments, before anything is computed or written.

Shapes and dtypes are checked when a call is traced. Lengths and page ids are checked if they are concrete, that is in
eager calls. Inside `jax.jit` they are traced, so call `check_batch` on the host first.
"""

import dataclasses

import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from paged_kernels._src.backends.base import Backend, PreparedBatch
from paged_kernels._src.backends.table import get_backend
from paged_kernels._src.batch import RaggedBatch
from paged_kernels._src.call import shapes_of
from paged_kernels._src.donation import check_not_donated
from paged_kernels._src.head_params import HeadParams
from paged_kernels._src.kv_layout import PLAIN_DTYPES
from paged_kernels._src.kv_pages import KVPages
from paged_kernels._src.spec import AttentionSpec

Q_STARTS_IN_A_WRITE = "batch.q_starts must be None in a write: its rows are the newest tokens of their sequences"


def check_attention_inputs(
    q: Array | jax.ShapeDtypeStruct,
    pages: KVPages,
    batch: RaggedBatch,
    head_params: HeadParams,
    sliding_window: int | None = None,
    *,
    writes: bool = False,
) -> None:
    """Check that queries and parameters fit the pages, and that the batch is well-formed.

    With `writes`, the batch is to be written too.

    Raises:
        ValueError: names the argument, what it is, and what it must be.
    """
    _check_none_donated({"q": q, "pages": pages, "batch": batch, "head_params": head_params})
    _check_pages(pages)
    _check_rows("q", q, "q_heads")
    if q.shape[2] != pages.head_dim:
        raise ValueError(f"q has head_dim {q.shape[2]}, but the pages have {pages.head_dim}; they must be equal")
    if q.shape[1] % pages.num_kv_heads:
        raise ValueError(
            f"q has {q.shape[1]} heads, which must be a multiple of the {pages.num_kv_heads} KV heads of the pages"
        )
    for field in dataclasses.fields(head_params):
        _check_head_param(field.name, getattr(head_params, field.name), q.shape[1])
    _check_batch_arrays(batch)
    _check_tree_mask(batch, q.shape[0])
    _check_values_if_known(batch, pages, q.shape[0], sliding_window, writes=writes)


def check_write_inputs(k: Array, v: Array | None, pages: KVPages, batch: RaggedBatch) -> None:
    """Check that new keys and values fit the pages, and that the batch is well-formed.

    Raises:
        ValueError: names the argument, what it is, and what it must be.
    """
    _check_none_donated({"k": k, "v": v, "pages": pages, "batch": batch})
    _check_pages(pages)
    _check_new_keys_and_values(k, v, pages)
    if batch.q_starts is not None:
        raise ValueError(Q_STARTS_IN_A_WRITE)
    _check_batch_arrays(batch)
    own_keys = 1  # a write looks only at the pages of its own rows, as if the window were one key
    _check_values_if_known(batch, pages, k.shape[0], sliding_window=own_keys, writes=True)


def check_update_inputs(
    q: Array,
    k: Array,
    v: Array | None,
    pages: KVPages,
    batch: RaggedBatch,
    *,
    head_params: HeadParams,
    sliding_window: int | None = None,
) -> None:
    """Check that the arguments of a write and an attention fit each other, and that the batch is well-formed.

    Raises:
        ValueError: names the argument, what it is, and what it must be.
    """
    _check_none_donated({"k": k, "v": v})
    check_attention_inputs(q, pages, batch, head_params, sliding_window, writes=True)
    _check_new_keys_and_values(k, v, pages)
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"k has {k.shape[0]} rows; it must have a row for each of the {q.shape[0]} rows of q")
    if batch.q_starts is not None:
        raise ValueError(Q_STARTS_IN_A_WRITE)


def check_prepared_attention(
    prepared: PreparedBatch,
    q: Array,
    pages: KVPages,
    *,
    spec: AttentionSpec,
    head_params: HeadParams,
    backend: str | Backend | None,
) -> None:
    """Check that the arguments are like those for which the batch was prepared.

    Raises:
        ValueError: names the argument, what it is, and what it must be.
    """
    _check_none_donated({"q": q, "pages": pages, "batch": prepared, "head_params": head_params})
    _check_same_backend(prepared, backend)
    call = prepared.fitted.call.attention
    if call is None:
        raise ValueError("batch was not prepared for attention; make it with prepare_batch")
    _check_prepared_for("q", shapes_of(q), call.q)
    _check_prepared_for("pages", shapes_of(pages), call.pages)
    _check_prepared_for("spec", spec, call.spec)
    _check_prepared_for("head_params", *map(_given, (head_params, call.head_params)))
    for field in dataclasses.fields(head_params):
        _check_head_param(field.name, getattr(head_params, field.name), q.shape[1])


def check_prepared_write(
    prepared: PreparedBatch, k: Array, v: Array | None, pages: KVPages, backend: str | Backend | None
) -> None:
    """Check that new keys and values are like those for which the batch was prepared.

    Raises:
        ValueError: names the argument, what it is, and what it must be.
    """
    _check_none_donated({"k": k, "v": v, "pages": pages, "batch": prepared})
    _check_same_backend(prepared, backend)
    call = prepared.fitted.call.write
    if call is None:
        raise ValueError(Q_STARTS_IN_A_WRITE)
    _check_prepared_for("pages", shapes_of(pages), call.pages)
    _check_new_keys_and_values(k, v, pages)
    if k.shape[0] != call.tokens:
        raise ValueError(f"k has {k.shape[0]} rows; the batch was prepared for {call.tokens}")


def _check_none_donated(arguments: dict[str, object]) -> None:
    for name, argument in arguments.items():
        check_not_donated(name, argument)


def _check_prepared_for(name: str, have: object, want: object) -> None:
    if have != want:
        raise ValueError(f"{name} does not fit the prepared batch: it is {have}, and must be {want}")


def _check_same_backend(prepared: PreparedBatch, backend: str | Backend | None) -> None:
    if backend is not None and get_backend(backend) != prepared.backend:
        name = backend if isinstance(backend, str) else backend.name
        raise ValueError(
            f"backend={name!r} is not the backend of the prepared batch, {prepared.backend.name!r}; leave it None, or "
            "prepare another batch"
        )


def _given(head_params: HeadParams) -> list[str]:
    """Returns the names of the given parameters."""
    fields = dataclasses.fields(head_params)
    return [field.name for field in fields if getattr(head_params, field.name) is not None]


def _check_new_keys_and_values(k: Array, v: Array | None, pages: KVPages) -> None:
    _check_rows("k", k, "kv_heads")
    _check_new_rows("k", k, pages.num_kv_heads, pages.head_dim)
    if pages.layout.latent and v is not None:
        raise ValueError("v must be None for latent pages, whose values are the first lanes of k")
    if not pages.layout.latent:
        _check_new_values(k, v, pages)


def _check_new_values(k: Array, v: Array | None, pages: KVPages) -> None:
    if v is None:
        raise ValueError("v is None, which is only for latent pages; give the new values")
    _check_rows("v", v, "kv_heads")
    _check_new_rows("v", v, pages.num_kv_heads, pages.v_head_dim)
    if k.shape[0] != v.shape[0]:
        raise ValueError(f"k {k.shape} and v {v.shape} must have the same number of rows")
    if k.dtype != v.dtype:
        raise ValueError(f"k ({k.dtype}) and v ({v.dtype}) must have the same dtype")


def _check_new_rows(name: str, rows: Array, kv_heads: int, dim: int) -> None:
    if rows.shape[1:] != (kv_heads, dim):
        raise ValueError(f"{name} has (kv_heads, head_dim) {rows.shape[1:]}, but the pages have {(kv_heads, dim)}")


def check_batch(
    batch: RaggedBatch,
    *,
    num_pages: int,
    page_size: int,
    tokens: int,
    sliding_window: int | None = None,
    writes: bool = True,
) -> None:
    """Check that a batch reads and writes only pages that it may. For the host, with concrete arrays.

    Args:
        batch: the step's sequences.
        num_pages: pages of the pool, with the null page.
        page_size: tokens per page.
        tokens: rows of the queries.
        sliding_window: `AttentionSpec.sliding_window`. Pages that no row sees may be the null page.
        writes: False if the batch is only read. Then sequences may share the slots of their rows, as forked sequences
            do in cross-attention. A batch with `q_starts` is never written.

    Raises:
        ValueError: names the field and the sequence, what it is, and what it must be.
    """
    arrays = jax.device_get((batch.page_table, batch.kv_lens, batch.cu_q_lens, batch.num_seqs))
    page_table, kv_lens, starts, num_seqs = map(np.asarray, arrays)
    if not 0 <= num_seqs <= batch.max_seqs:
        raise ValueError(f"num_seqs={num_seqs} must lie in 0..{batch.max_seqs}, the most sequences of the batch")
    if starts[0] != 0:
        raise ValueError(f"cu_q_lens[0]={starts[0]} must be 0")
    if starts[num_seqs] > tokens:
        raise ValueError(f"cu_q_lens[{num_seqs}]={starts[num_seqs]} must be at most the {tokens} rows given")
    for seq in range(int(num_seqs)):
        q_len = int(starts[seq + 1] - starts[seq])
        kv_len = int(kv_lens[seq])
        _check_lengths(seq, q_len, kv_len, batch)
        first_seen = 0 if sliding_window is None else max(0, kv_len - q_len - sliding_window + 1)
        used = page_table[seq, : -(-kv_len // page_size)]
        _check_width(seq, kv_len, page_table.shape[1], page_size)
        _check_page_ids(seq, used, first_seen // page_size, num_pages)
    if writes and batch.q_starts is None:
        _check_slots_of_rows(page_table, kv_lens[:num_seqs], starts[: num_seqs + 1], page_size)


def _check_lengths(seq: int, q_len: int, kv_len: int, batch: RaggedBatch) -> None:
    max_q_len = batch.max_q_len
    if q_len < 0:
        raise ValueError(f"cu_q_lens decreases at sequence {seq} (by {-q_len}); it must not")
    if max_q_len is not None and q_len > max_q_len:
        raise ValueError(f"sequence {seq} has {q_len} rows, more than max_q_len={max_q_len}")
    if kv_len < 0:
        raise ValueError(f"kv_lens[{seq}]={kv_len} must not be negative; use 0 for an idle sequence")
    if 0 < kv_len < q_len and batch.q_starts is None:
        raise ValueError(f"kv_lens[{seq}]={kv_len} must count the {q_len} new rows of the sequence too")


def _check_width(seq: int, kv_len: int, pages_per_seq: int, page_size: int) -> None:
    used = -(-kv_len // page_size)
    if used > pages_per_seq:
        raise ValueError(
            f"kv_lens[{seq}]={kv_len} needs {used} pages of {page_size}, "
            f"but the page table has {pages_per_seq} per sequence"
        )


def _check_page_ids(seq: int, page_ids: np.ndarray, first_seen: int, num_pages: int) -> None:
    outside = (page_ids < 0) | (page_ids >= num_pages)
    outside[first_seen:] |= page_ids[first_seen:] == 0
    if outside.any():
        at = int(np.argmax(outside))
        raise ValueError(
            f"page_table[{seq}, {at}]={page_ids[at]} must lie in 1..{num_pages - 1} (page 0 is the null page)"
        )


def _check_slots_of_rows(page_table: np.ndarray, kv_lens: np.ndarray, starts: np.ndarray, page_size: int) -> None:
    """Refuse two rows with one slot: which of them is stored would be undefined."""
    q_lens = np.where(kv_lens > 0, np.diff(starts), 0)
    seq = np.repeat(np.arange(len(q_lens)), q_lens)
    first_row = np.cumsum(q_lens) - q_lens
    position = (kv_lens - q_lens - first_row)[seq] + np.arange(len(seq))
    slots = page_table[seq, position // page_size].astype(np.int64) * page_size + position % page_size
    order = np.argsort(slots, kind="stable")
    (doubled,) = np.nonzero(np.diff(slots[order]) == 0)
    if len(doubled):
        first, second = seq[order[doubled[0] : doubled[0] + 2]]
        page, slot = divmod(int(slots[order[doubled[0]]]), page_size)
        who = f"sequence {first} writes" if first == second else f"sequences {first} and {second} both write"
        raise ValueError(
            f"{who} slot {slot} of page {page}{' twice' if first == second else ''}; each new row must have a slot of "
            "its own: copy a shared page before its next slot is written. A batch that is only read has q_starts"
        )


def _check_pages(pages: KVPages) -> None:
    layout, shape = pages.layout, pages.data.shape
    if len(shape) != 4 or shape[3] != layout.storage_lanes or pages.data.dtype != layout.storage_dtype:
        raise ValueError(
            f"pages.data is {pages.data.dtype}{list(shape)}; it must be {layout.storage_dtype} "
            f"[pages, kv_heads, page_size, {layout.storage_lanes}]; build pages with KVPages.zeros or KVPages.from_kv"
        )
    want = (*shape[:2], 1, layout.scale_lanes(shape[2])) if layout.is_quantised else None
    have = None if pages.scales is None else pages.scales.shape
    if have != want or (pages.scales is not None and pages.scales.dtype != np.float32):
        raise ValueError(f"pages.scales is {have}; for {layout.dtype} pages it must be {want} (float32)")


def _check_head_param(name: str, value: Array | None, q_heads: int) -> None:
    if value is None:
        return
    if value.shape != (q_heads,) or value.dtype.name not in PLAIN_DTYPES:
        raise ValueError(
            f"head_params.{name} is {value.dtype}{list(value.shape)}; it must be a floating array [{q_heads}]"
        )


def _check_rows(name: str, rows: Array | jax.ShapeDtypeStruct, heads: str) -> None:
    if rows.ndim != 3 or 0 in rows.shape:
        raise ValueError(f"{name} {rows.shape} must be [tokens, {heads}, head_dim], without an axis of size 0")
    if rows.dtype.name not in PLAIN_DTYPES:
        raise ValueError(f"{name} has dtype {rows.dtype}; it must be one of {', '.join(PLAIN_DTYPES)}")


def _check_batch_arrays(batch: RaggedBatch) -> None:
    ndims = {"page_table": 2, "kv_lens": 1, "cu_q_lens": 1, "num_seqs": 0, "tree_mask": 2, "q_starts": 1}
    for name, ndim in ndims.items():
        array = getattr(batch, name)
        if array is None and name in ("tree_mask", "q_starts"):
            continue
        if not isinstance(array, jax.Array | np.ndarray | np.generic):
            raise ValueError(f"{name} is of type {type(array).__name__}; it must be an int32 array with {ndim} axes")
        if array.ndim != ndim or array.dtype != np.int32:
            raise ValueError(f"{name} is {array.dtype}{list(array.shape)}; it must be int32 with {ndim} axes")
    if 0 in batch.page_table.shape:
        raise ValueError(f"page_table {batch.page_table.shape} must have room for at least one sequence and one page")
    if batch.kv_lens.shape[0] != batch.max_seqs:
        raise ValueError(f"kv_lens has {batch.kv_lens.shape[0]} entries; page_table has {batch.max_seqs} sequences")
    if batch.q_starts is not None and batch.q_starts.shape[0] != batch.max_seqs:
        raise ValueError(f"q_starts has {batch.q_starts.shape[0]} entries; page_table has {batch.max_seqs} sequences")
    if batch.cu_q_lens.shape[0] != batch.max_seqs + 1:
        raise ValueError(
            f"cu_q_lens has {batch.cu_q_lens.shape[0]} entries; it must have seqs + 1 = {batch.max_seqs + 1}"
        )


def _check_tree_mask(batch: RaggedBatch, tokens: int) -> None:
    if batch.tree_mask is None:
        return
    rows, words = batch.tree_mask.shape
    if rows != tokens:
        raise ValueError(f"tree_mask has {rows} rows; q has {tokens}")
    if batch.max_q_len is None or batch.max_q_len > 32 * words:
        raise ValueError(
            f"max_q_len={batch.max_q_len} must be at most {32 * words}, because tree_mask has {words} words of 32 bits"
        )


def _check_values_if_known(
    batch: RaggedBatch, pages: KVPages, tokens: int, sliding_window: int | None, *, writes: bool
) -> None:
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(batch)):
        return
    check_batch(
        batch,
        num_pages=pages.num_pages,
        page_size=pages.page_size,
        tokens=tokens,
        sliding_window=sliding_window,
        writes=writes,
    )
