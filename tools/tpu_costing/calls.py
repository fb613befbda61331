"""The calls that are compiled: our kernels, and the kernels that jax ships."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpu_costing.workloads import Batch, Workload

CONTESTANTS = ("ours", "jax paged", "jax ragged")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contestant:
    """A kernel with its block sizes.

    Raises:
        ValueError: there is no such kernel.
    """

    kernel: str
    """One of `CONTESTANTS`."""
    q_rows: int | None = None
    """Query rows in a block. None: the kernel's own choice."""
    kv_pages: int | None = None
    """Pages in a block. None: the kernel's own choice."""

    def __post_init__(self) -> None:
        if self.kernel not in CONTESTANTS:
            raise ValueError(f"kernel={self.kernel!r} must be one of {', '.join(CONTESTANTS)}")

    @property
    def blocks(self) -> str:
        """The block sizes as text."""
        return "default" if self.kv_pages is None else f"{self.q_rows or 1}x{self.kv_pages}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """A call `function(integers, *arrays)`."""

    function: Callable[..., Any]
    integers: Any
    """Lengths and page ids, as numpy arrays."""
    page_table: np.ndarray
    shapes: tuple[Any, ...]
    """Shapes of the arrays, as `jax.ShapeDtypeStruct`."""
    donate: tuple[int, ...] = ()
    """Arguments that the call may overwrite."""


def make_call(workload: Workload, contestant: Contestant, batch: int) -> Call:
    """Returns the call for one of a workload's batches.

    Raises:
        NotImplementedError: the kernel does not support the workload.
    """
    make = {"ours": _ours, "jax paged": _jax_paged, "jax ragged": _jax_ragged}[contestant.kernel]
    return make(workload, contestant, workload.batches[batch])


def peers(workload: Workload) -> tuple[Contestant, ...]:
    """Returns the kernels of jax, each with its default and with larger block sizes. The best of each counts."""
    rows = 1 if workload.mode == "decode" else 64
    ragged = [Contestant(kernel="jax ragged")]
    ragged += [
        Contestant(kernel="jax ragged", q_rows=rows, kv_pages=max(1, keys // workload.page_size))
        for keys in (512, 1024)
    ]
    if workload.mode != "decode":
        return tuple(ragged)
    keys = [keys for keys in (512, 2048) if keys <= workload.context]
    return (*(Contestant(kernel="jax paged", kv_pages=n // workload.page_size) for n in keys), *ragged)


def _struct(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _q_dtype(w: Workload) -> str:
    return "float32" if w.dtype == "float32" else "bfloat16"


def _page_table(w: Workload, sequences: Batch) -> np.ndarray:
    """Returns a page table with ids from 1 up, each once. All rows are as long as the longest sequence needs."""
    columns = max(-(-tokens // w.page_size) for tokens, _ in sequences)
    return 1 + np.arange(len(sequences) * columns, dtype=np.int32).reshape(len(sequences), columns)


def _ours(w: Workload, contestant: Contestant, sequences: Batch) -> Call:
    from paged_kernels import AttentionSpec, KVPages, RaggedBatch, get_backend, paged_attention, write_kv  # noqa: PLC0415

    table = _page_table(w, sequences)
    tokens, rows = zip(*sequences, strict=True)
    batch = RaggedBatch.from_lists(table.tolist(), list(tokens), list(rows), max_q_len=1 if max(rows) == 1 else None)
    pages = KVPages.shapes(table.size + 1, w.page_size, w.kv_heads, w.head_dim, w.dtype)
    backend = get_backend("tpu")
    if contestant.kv_pages is not None:
        backend = backend.with_block_sizes(q_rows=contestant.q_rows or 1, kv_pages=contestant.kv_pages)
    spec = AttentionSpec(sliding_window=w.window)

    def attend(batch, pages, q):
        return paged_attention(q, pages, batch, spec, backend=backend)

    def write(batch, pages, k, v):
        return write_kv(pages, k, v, batch, backend="tpu")

    integers = jax.tree.map(np.asarray, batch)
    if w.mode == "write":
        row = _struct(_q_dtype(w), sum(rows), w.kv_heads, w.head_dim)
        return Call(function=write, integers=integers, page_table=table, shapes=(pages, row, row), donate=(1,))
    q = _struct(_q_dtype(w), sum(rows), w.q_heads, w.head_dim)
    return Call(function=attend, integers=integers, page_table=table, shapes=(pages, q))


def _jax_paged(w: Workload, contestant: Contestant, sequences: Batch) -> Call:
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention, quantization_utils  # noqa: PLC0415

    if w.mode != "decode" or w.window is not None:
        raise NotImplementedError("no sliding window" if w.mode == "decode" else "decode only")
    table = _page_table(w, sequences)
    integers = (np.asarray([tokens for tokens, _ in sequences], np.int32), table)
    kv = _struct(w.dtype, w.kv_heads, table.size + 1, w.page_size, w.head_dim)
    if w.dtype == "int8":
        scales = _struct(jnp.float32, *kv.shape[:-1], 1)
        kv = quantization_utils.QuantizedTensor(weight=kv, scales=scales)  # pyright: ignore[reportArgumentType]

    def attend(integers, q, k, v):
        return paged_attention(q, k, v, *integers, pages_per_compute_block=contestant.kv_pages)

    q = _struct(_q_dtype(w), len(sequences), w.q_heads, w.head_dim)
    return Call(function=attend, integers=integers, page_table=table, shapes=(q, kv, kv))


def _jax_ragged(w: Workload, contestant: Contestant, sequences: Batch) -> Call:
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention  # noqa: PLC0415

    if w.mode == "write":
        raise NotImplementedError("attention only")
    table = _page_table(w, sequences)
    tokens, rows = zip(*sequences, strict=True)
    starts = np.concatenate([[0], np.cumsum(rows)]).astype(np.int32)
    integers = (np.asarray(tokens, np.int32), table, starts, np.asarray([len(sequences)], np.int32))
    scale = 1.0 if w.dtype not in {"bfloat16", "float32"} else None
    blocks: dict[str, Any] = {}
    if contestant.kv_pages is not None:
        blocks = {
            "num_kv_pages_per_block": min(contestant.kv_pages, table.shape[1]),
            "num_queries_per_block": min(contestant.q_rows or 1, sum(rows)),
            "vmem_limit_bytes": 48 * 2**20,
        }

    def attend(integers, q, kv):
        return ragged_paged_attention(q, kv, *integers, sliding_window=w.window, k_scale=scale, v_scale=scale, **blocks)

    q = _struct(_q_dtype(w), sum(rows), w.q_heads, w.head_dim)
    kv = _struct(w.dtype, table.size + 1, w.page_size, 2 * w.kv_heads, w.head_dim)
    return Call(function=attend, integers=integers, page_table=table, shapes=(q, kv))
