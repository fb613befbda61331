"""Data in which every key matters, named workloads, the dense float64 oracle, and the check of a result.

Random signed data with logits of a spread near one half gives each key a weight that shows. Whatever must not be read
is NaN: the null page, pages nobody owns, slots past a sequence's end, pages wholly outside a window, and the rows of q,
k and v that are no token. Table entries and sequence slots that are not in use hold nonsense.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from paged_kernels import AttentionSpec, KVPages, RaggedBatch, paged_attention, write_kv

TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
"""Largest error of an output row, relative to the largest magnitude in the row."""

attend = jax.jit(paged_attention, static_argnames=("spec", "backend", "block_sizes", "return_lse"))
"""`paged_attention`, compiled once for each shape, spec and backend in the whole test run."""
write = jax.jit(write_kv, static_argnames=("backend",))
"""`write_kv`, likewise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """One step's sequences by their lengths; the rest is padded to common shapes, so that compilations are shared."""

    kv_lens: tuple[int, ...]
    """Tokens of each sequence, its new ones included; 0 is a gap."""
    q_lens: tuple[int, ...]
    """Rows of each sequence."""
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    tokens: int = 40
    """Rows of q, padding included."""
    seqs: int = 6
    """Sequence slots; those past the last sequence hold nonsense."""
    pages_per_seq: int = 5
    num_pages: int = 32
    max_q_len: int | None = None


def decode(*kv_lens: int, **shape: int) -> Workload:
    """A workload of one row a sequence, and of nothing but such."""
    return Workload(kv_lens=kv_lens, q_lens=(1,) * len(kv_lens), max_q_len=1, **{"tokens": 6, **shape})


WORKLOADS = {
    "decode": decode(37, 1, 16, 48, 17, 70),
    "decode_idle_slots": decode(23, 0, 5, 0, 41),
    "decode_mqa": decode(33, 64, 7, q_heads=4, kv_heads=1),
    "decode_mha": decode(19, 35, 50, q_heads=2, kv_heads=2),
    "prefill": Workload(kv_lens=(35,), q_lens=(35,)),
    "prefill_many": Workload(kv_lens=(16, 1, 17, 5), q_lens=(16, 1, 17, 5)),
    "prefill_mqa": Workload(kv_lens=(18, 20), q_lens=(18, 20), q_heads=4, kv_heads=1),
    "prefill_mha": Workload(kv_lens=(21, 15), q_lens=(21, 15), q_heads=2, kv_heads=2),
    "chunked_prefill": Workload(kv_lens=(72, 40), q_lens=(19, 17)),
    "mixed": Workload(kv_lens=(53, 12, 30, 1, 66), q_lens=(18, 12, 1, 1, 1)),
    "multi_token_decode": Workload(kv_lens=(45, 9, 32, 17), q_lens=(4, 3, 4, 1)),
    "gaps": Workload(kv_lens=(20, 0, 31, 0, 8), q_lens=(7, 5, 9, 3, 1)),
    "no_rows": Workload(kv_lens=(20, 24, 11), q_lens=(4, 0, 5)),
    "all_idle": Workload(kv_lens=(0, 0), q_lens=(3, 0)),
    "empty": Workload(kv_lens=(), q_lens=()),
    "full_table": Workload(kv_lens=(80, 80), q_lens=(16, 24)),
    "head_128": Workload(kv_lens=(29, 34), q_lens=(11, 1), head_dim=128),
    "small_pages": Workload(kv_lens=(29, 34, 8), q_lens=(11, 1, 8), page_size=8),
    "large_pages": Workload(kv_lens=(29, 70), q_lens=(11, 1), page_size=64, pages_per_seq=2, num_pages=8),
    "wide_group": Workload(kv_lens=(44, 25), q_lens=(9, 1), q_heads=8, kv_heads=1),
}

SPECS = {
    "plain": AttentionSpec(),
    "scale": AttentionSpec(scale=0.15),
    "cap": AttentionSpec(soft_cap=1.0),
    "window": AttentionSpec(sliding_window=21),
    "window_of_one": AttentionSpec(sliding_window=1),
    "window_of_a_page": AttentionSpec(sliding_window=16),
    "bidirectional": AttentionSpec(causal=False),
    "bidirectional_window": AttentionSpec(causal=False, sliding_window=9),
    "everything": AttentionSpec(scale=0.18, soft_cap=1.5, sliding_window=30),
}


def has_common_shape(workload: Workload) -> bool:
    """Whether its arrays have the shapes that most workloads share."""
    return (workload.page_size, workload.q_heads, workload.kv_heads, workload.head_dim) == (16, 4, 2, 64)


CASES = [
    (name, spec)
    for name, workload in WORKLOADS.items()
    for spec in SPECS
    if spec == "everything" or has_common_shape(workload)
]
"""`(workload, spec)` by name: every spec over the common shapes, one over the others, to keep the compilations few."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A workload with data, as a backend takes it, and the same keys and values in plain order."""

    workload: Workload
    q: jax.Array
    """`[tokens, q_heads, head_dim]`; NaN in rows that are no token."""
    pages: KVPages
    """Every sequence's keys and values, its new ones included; NaN wherever nobody may read."""
    batch: RaggedBatch
    keys: tuple[np.ndarray, ...]
    """Each sequence's `[kv_len, kv_heads, head_dim]`, float64, rounded as the pages are."""
    values: tuple[np.ndarray, ...]
    """Likewise."""

    def new_rows(self, of: tuple[np.ndarray, ...]) -> jax.Array:
        """The batch's own rows of `keys` or `values`, `[tokens, kv_heads, head_dim]`; NaN in the other rows."""
        rows = np.full((self.q.shape[0], *self.pages.k.shape[:1], self.pages.head_dim), np.nan)
        for seq, row in token_places(self.workload):
            q_len, kv_len = self.workload.q_lens[seq], self.workload.kv_lens[seq]
            rows[row : row + q_len] = of[seq][kv_len - q_len :]
        return jnp.asarray(rows, self.pages.dtype)


def make_case(workload: Workload, *, spec: AttentionSpec | None = None, dtype="float32", seed: int = 0) -> Case:
    """The workload with data. With a spec that has a window, the pages wholly outside it are NaN too."""
    rng = np.random.default_rng(seed)
    heads = (workload.kv_heads, workload.head_dim)
    keys = tuple(rounded(rng.standard_normal((n, *heads)), dtype) for n in workload.kv_lens)
    values = tuple(rounded(signed(rng, (n, *heads)), dtype) for n in workload.kv_lens)
    q = np.full((workload.tokens, workload.q_heads, workload.head_dim), np.nan)
    for seq, row in token_places(workload):
        q_len = workload.q_lens[seq]
        q[row : row + q_len] = 0.5 * rng.standard_normal((q_len, *q.shape[1:]))
    page_lists = shuffled_pages(workload, rng)
    batch = make_batch(workload, page_lists)
    k_pages, v_pages = (fill_pages(workload, page_lists, rows, spec) for rows in (keys, values))
    pages = KVPages.from_kv(jnp.asarray(k_pages, dtype), jnp.asarray(v_pages, dtype))
    return Case(workload, jnp.asarray(q, dtype), pages, batch, keys, values)


def signed(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Values of either sign and magnitude 0.5 to 1.5: none so small that its absence would not show."""
    return rng.choice([-1.0, 1.0], shape) * rng.uniform(0.5, 1.5, shape)


def rounded(array: np.ndarray, dtype) -> np.ndarray:
    """`array` in float64, after rounding to `dtype`: what the pages hold, exactly."""
    return array.astype(jnp.dtype(dtype)).astype(np.float64)


def token_places(workload: Workload) -> list[tuple[int, int]]:
    """`(sequence, first row)` of each sequence that is no gap."""
    starts = np.cumsum([0, *workload.q_lens])
    return [(seq, int(starts[seq])) for seq, kv_len in enumerate(workload.kv_lens) if kv_len]


def shuffled_pages(workload: Workload, rng: np.random.Generator) -> list[list[int]]:
    """Pages for each sequence from a random order of all but the null page."""
    free = list(map(int, rng.permutation(np.arange(1, workload.num_pages))))
    return [[free.pop() for _ in range(-(-n // workload.page_size))] for n in workload.kv_lens]


def make_batch(workload: Workload, page_lists: list[list[int]]) -> RaggedBatch:
    """The batch at the workload's shapes; what is not in use names a page that nobody owns, or is nonsense."""
    unowned = next(p for p in range(1, workload.num_pages) if p not in {p for pages in page_lists for p in pages})
    table = np.full((workload.seqs, workload.pages_per_seq), unowned, np.int32)
    for row, pages in zip(table, page_lists, strict=False):
        row[: len(pages)] = pages
    kv_lens = np.full(workload.seqs, 999, np.int32)
    kv_lens[: len(page_lists)] = workload.kv_lens
    starts = np.full(workload.seqs + 1, -7, np.int32)
    starts[: len(page_lists) + 1] = np.cumsum([0, *workload.q_lens])
    return RaggedBatch(
        page_table=jnp.asarray(table),
        kv_lens=jnp.asarray(kv_lens),
        cu_q_lens=jnp.asarray(starts),
        num_seqs=jnp.int32(len(page_lists)),
        max_q_len=workload.max_q_len,
    )


def fill_pages(workload: Workload, page_lists, rows, spec: AttentionSpec | None) -> np.ndarray:
    """`[kv_heads, pages, page_size, head_dim]` with each sequence's rows in its pages, and NaN everywhere else."""
    size = workload.page_size
    paged = np.full((workload.num_pages, size, workload.kv_heads, workload.head_dim), np.nan)
    for seq, pages in enumerate(page_lists):
        for index in range(first_page(workload, seq, spec), len(pages)):
            held = rows[seq][index * size : (index + 1) * size]
            paged[pages[index], : len(held)] = held
    return paged.transpose(2, 0, 1, 3)


def first_page(workload: Workload, seq: int, spec: AttentionSpec | None) -> int:
    """Index of the sequence's first page with a key that some row may see; all of them where there are no rows."""
    if spec is None or spec.sliding_window is None:
        return 0
    oldest_row = workload.kv_lens[seq] - workload.q_lens[seq]
    return max(0, oldest_row - spec.sliding_window + 1) // workload.page_size


def attend_densely(case: Case, spec: AttentionSpec) -> tuple[np.ndarray, np.ndarray]:
    """The oracle: `softmax(q k^T) v` on each sequence's contiguous keys and values, in float64. Output and lse."""
    q = np.asarray(case.q, np.float64)
    out, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    for seq, row in token_places(case.workload):
        rows = slice(row, row + case.workload.q_lens[seq])
        out[rows], lse[rows] = attend_one(q[rows], case.keys[seq], case.values[seq], spec)
    return out, lse


def attend_one(q: np.ndarray, k: np.ndarray, v: np.ndarray, spec: AttentionSpec) -> tuple[np.ndarray, np.ndarray]:
    """One sequence's newest rows `q [rows, q_heads, d]` over all its keys and values `[keys, kv_heads, d]`."""
    k, v = (np.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    s = np.einsum("thd,phd->thp", q, k) * (q.shape[2] ** -0.5 if spec.scale is None else spec.scale)
    if spec.soft_cap is not None:
        s = spec.soft_cap * np.tanh(s / spec.soft_cap)
    t, p = np.arange(len(k) - len(q), len(k))[:, None, None], np.arange(len(k))
    hidden = spec.causal & (p > t)
    if spec.sliding_window is not None:
        hidden |= p <= t - spec.sliding_window
    s = np.where(hidden, -np.inf, s)
    top = s.max(axis=-1, keepdims=True, initial=-1e30)
    weights = np.exp(s - top)
    total = weights.sum(axis=-1)
    return np.einsum("thp,phd->thd", weights, v) / total[..., None], top[..., 0] + np.log(total)


def row_errors(actual, expected) -> np.ndarray:
    """The largest error in each row (last axis), relative to the largest magnitude expected; NaN counts as inf."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    error = np.abs(actual - expected).max(axis=-1)
    scale = np.abs(expected).max(axis=-1)
    relative = np.divide(error, scale, out=np.where(error == 0, 0.0, np.inf), where=scale > 0)
    return np.where(np.isnan(relative), np.inf, relative)


def assert_rows_close(actual, expected, dtype) -> None:
    """Each row of `actual` is within the type's tolerance of `expected`; a row of zeros must be exactly zero."""
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    limit = TOLERANCE[jnp.dtype(dtype).name]
    errors = row_errors(actual, expected)
    if not errors.size or errors.max() <= limit:
        return
    at = tuple(map(int, np.unravel_index(errors.argmax(), errors.shape)))
    raise AssertionError(
        f"{(errors > limit).sum()} of {errors.size} rows are off by more than {limit:g} of their scale; "
        f"the worst is row (token, head) {at}, off by {errors[at]:.3g}:\n"
        f"  actual   {np.asarray(actual[at], np.float64)[:6]} ...\n"
        f"  expected {np.asarray(expected[at], np.float64)[:6]} ..."
    )


def assert_lse_close(actual, expected, dtype="float32") -> None:
    """The log-sum-exp agrees, absolutely, to the type's tolerance; -inf exactly where no key is visible."""
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=4 * TOLERANCE[str(dtype)])
