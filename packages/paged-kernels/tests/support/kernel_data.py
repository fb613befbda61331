"""Data in which every key matters, named workloads, the dense float64 oracle, and the check of a result.

Data are random and signed, and logits have a standard deviation near one half. So each key has a weight that shows.
Everything that must not be read is NaN: the null page, pages without an owner, slots past a sequence's end, pages
outside a window, and rows of q, k and v that are not tokens. Quantised pages have NaN scales there, and random
integers. Unused entries of the page table, unused sequences and unused bits of a tree mask are nonsense.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from kernel_oracle import TOLERANCE, assert_lse_close, assert_rows_close, attend_one, row_errors  # noqa: F401
from kernel_workloads import (  # noqa: F401 -- tests take all that they need from here
    ALL_CASES,
    CASES,
    EVERY_WORKLOAD,
    FEATURE_CASES,
    FEATURES,
    HEADS,
    KV_DTYPES,
    LONG,
    ONE_FEATURE_CASE,
    SPECS,
    TWO_FEATURE_CASES,
    WORKLOADS,
    Workload,
    decode,
)

from paged_kernels import (
    AttentionSpec,
    Backend,
    HeadParams,
    KVLayout,
    KVPages,
    RaggedBatch,
    get_backend,
    paged_attention,
    write_kv,
)
from paged_kernels._src.attention.block_sizes import BlockSizes

attend = jax.jit(paged_attention, static_argnames=("spec", "backend", "return_lse"))
"""`paged_attention`, compiled once for each shape, spec and backend in the whole test run."""
write = jax.jit(write_kv, static_argnames=("backend",))
"""`write_kv`, compiled in the same way."""
from_kv = jax.jit(KVPages.from_kv, static_argnames=("dtype",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A workload with data as a backend takes it, and the same keys and values in plain order."""

    workload: Workload
    q: jax.Array
    """`[tokens, q_heads, head_dim]`; NaN in rows that are not tokens."""
    pages: KVPages
    """The keys and values of every sequence, new ones included; NaN in every place that must not be read."""
    batch: RaggedBatch
    heads: HeadParams
    keys: tuple[np.ndarray, ...]
    """The keys of each sequence, `[kv_len, kv_heads, head_dim]`, float64, exactly as the pages hold them."""
    values: tuple[np.ndarray, ...]
    """The values of each sequence, `[kv_len, kv_heads, v_head_dim]`, float64, exactly as the pages hold them."""
    given_keys: tuple[np.ndarray, ...]
    """The keys from which the pages were made. Quantised pages hold only numbers near to them."""
    given_values: tuple[np.ndarray, ...]
    """The values from which the pages were made."""
    trees: np.ndarray | None
    """True where a row sees a new token, `[tokens, 32 * words]`."""

    def new_rows(self, of: tuple[np.ndarray, ...]) -> jax.Array:
        """The batch's own rows of `keys` or `values`, `[tokens, kv_heads, dim]`; NaN in the other rows."""
        dim = of[0].shape[2] if of else self.workload.head_dim
        rows = np.full((self.q.shape[0], self.workload.kv_heads, dim), np.nan)
        for seq, row in token_places(self.workload):
            q_len, kv_len = self.workload.q_lens[seq], self.workload.kv_lens[seq]
            rows[row : row + q_len] = of[seq][kv_len - q_len :]
        return jnp.asarray(rows, self.q.dtype if self.pages.layout.is_quantised else self.pages.dtype)


def make_case(
    workload: Workload,
    *,
    spec: AttentionSpec | None = None,
    dtype="float32",
    kv_dtype=None,
    heads: str = "plain",
    seed: int = 0,
) -> Case:
    """Returns the workload with data. If the spec has a window, pages outside of it are NaN too.

    Args:
        workload: the sequences and shapes.
        spec: decides which pages no row may see.
        dtype: the type of q, and by default of the pages.
        kv_dtype: the type of the pages.
        heads: a key of `HEADS`.
        seed: the seed of the random numbers.
    """
    rng = np.random.default_rng(seed)
    kv_dtype = dtype if kv_dtype is None else kv_dtype
    keys, values = make_keys_and_values(workload, rng, kv_dtype)
    q = np.full((workload.tokens, workload.q_heads, workload.head_dim), np.nan)
    for seq, row in token_places(workload):
        q_len = workload.q_lens[seq]
        q[row : row + q_len] = 0.5 * rng.standard_normal((q_len, *q.shape[1:]))
    page_lists = shuffled_pages(workload, rng)
    trees = random_trees(workload, rng) if workload.tree else None
    pages, *held = make_pages(workload, page_lists, (keys, values), spec, kv_dtype)
    return Case(
        workload=workload,
        q=jnp.asarray(q, dtype),
        pages=pages,
        batch=make_batch(workload, page_lists, trees),
        heads=make_heads(workload, HEADS[heads]),
        keys=held[0],
        values=held[1],
        given_keys=keys,
        given_values=values,
        trees=trees,
    )


def make_named_case(workload: str, kv_dtype: str, spec: str, heads: str, dtype: str = "float32") -> Case:
    """Returns a case of `ALL_CASES`."""
    return make_case(EVERY_WORKLOAD[workload], spec=SPECS[spec], dtype=dtype, kv_dtype=kv_dtype, heads=heads)


def make_keys_and_values(workload: Workload, rng: np.random.Generator, kv_dtype):
    """Returns each sequence's keys and values, rounded to `kv_dtype` unless that has scales."""
    quantised = KVLayout.create(1, kv_dtype).is_quantised

    def rows(draw, dim):
        made = [draw((n, workload.kv_heads, dim)) for n in workload.kv_lens]
        if not quantised:
            return tuple(rounded(x, kv_dtype) for x in made)
        return tuple(x * rng.uniform(0.7, 1.4, (*x.shape[:2], 1)) for x in made)  # each gets its own scale

    if workload.latent:
        keys = rows(functools.partial(signed, rng), workload.head_dim)
        return keys, tuple(x[..., : workload.value_dim] for x in keys)
    return rows(rng.standard_normal, workload.head_dim), rows(functools.partial(signed, rng), workload.value_dim)


def make_heads(workload: Workload, fields: tuple[str, ...]) -> HeadParams:
    """Sinks that weigh as much as a few keys, and slopes that leave far keys some weight. Each head has its own."""
    steps = np.arange(1, workload.q_heads + 1) / workload.q_heads
    params = {"sinks": 1 + 2 * steps, "alibi_slopes": 0.02 * steps[::-1]}
    return HeadParams(**{name: jnp.asarray(params[name], jnp.float32) for name in fields})


def random_trees(workload: Workload, rng: np.random.Generator) -> np.ndarray:
    """Random bits, few in some rows and many in others. Also past the new tokens, where they must not matter."""
    bits = (workload.tokens, 32 * -(-workload.max_q_len // 32))
    return rng.random(bits) < rng.uniform(0, 1, (workload.tokens, 1))


def signed(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Values of either sign, with magnitudes 0.5 to 1.5: none so small that its absence would not show."""
    return rng.choice([-1.0, 1.0], shape) * rng.uniform(0.5, 1.5, shape)


def rounded(array: np.ndarray, dtype) -> np.ndarray:
    """`array` in float64, after rounding to `dtype`: exactly what the pages hold."""
    return array.astype(jnp.dtype(dtype)).astype(np.float64)


def token_places(workload: Workload) -> list[tuple[int, int]]:
    """Returns `(sequence, first row)` of each sequence that is not a gap."""
    starts = np.cumsum([0, *workload.q_lens])
    return [(seq, int(starts[seq])) for seq, kv_len in enumerate(workload.kv_lens) if kv_len]


def shuffled_pages(workload: Workload, rng: np.random.Generator) -> list[list[int]]:
    """Returns pages for each sequence, from a random order of all pages but the null page."""
    free = list(map(int, rng.permutation(np.arange(1, workload.num_pages))))
    return [[free.pop() for _ in range(-(-n // workload.page_size))] for n in workload.kv_lens]


def make_batch(workload: Workload, page_lists: list[list[int]], trees: np.ndarray | None = None) -> RaggedBatch:
    """Returns the batch at the workload's shapes. Unused entries name a page without an owner, or are nonsense."""
    unowned = next(p for p in range(1, workload.num_pages) if p not in {p for pages in page_lists for p in pages})
    page_table = np.full((workload.seqs, workload.pages_per_seq), unowned, np.int32)
    for row, pages in zip(page_table, page_lists, strict=False):
        row[: len(pages)] = pages
    kv_lens = np.full(workload.seqs, 999, np.int32)
    kv_lens[: len(page_lists)] = workload.kv_lens
    starts = np.full(workload.seqs + 1, -7, np.int32)
    starts[: len(page_lists) + 1] = np.cumsum([0, *workload.q_lens])
    return RaggedBatch(
        page_table=jnp.asarray(page_table),
        kv_lens=jnp.asarray(kv_lens),
        cu_q_lens=jnp.asarray(starts),
        num_seqs=jnp.int32(len(page_lists)),
        max_q_len=workload.max_q_len,
        tree_mask=None if trees is None else jnp.asarray(words_of(trees)),
        q_starts=None if workload.q_starts is None else jnp.asarray(padded(workload.q_starts, workload.seqs)),
    )


def padded(entries: tuple[int, ...], size: int) -> np.ndarray:
    """The entries, followed by nonsense."""
    return np.array([*entries, *[-5] * (size - len(entries))], np.int32)


def words_of(bits: np.ndarray) -> np.ndarray:
    """Bits `[rows, 32 * words]` as int32: bit `j % 32` of word `j // 32`."""
    by_word = bits.reshape(len(bits), -1, 32).astype(np.uint64)
    return (by_word << np.arange(32, dtype=np.uint64)).sum(axis=-1).astype(np.uint32).view(np.int32)


def make_pages(workload: Workload, page_lists, rows, spec: AttentionSpec | None, kv_dtype):
    """Returns pages of these keys and values, NaN where nothing may be read, and the keys and values as stored."""
    keys, values = rows

    def build(spec):
        source = "float64" if kv_dtype == "float64" else "float32"
        k, v = (jnp.asarray(fill_pages(workload, page_lists, of, spec), source) for of in (keys, values))
        pages = from_kv(k, None if workload.latent else v, kv_dtype)
        layout = KVLayout.create(workload.head_dim, kv_dtype, v_head_dim=workload.value_dim, latent=workload.latent)
        return dataclasses.replace(pages, layout=layout)

    pages = build(spec)
    if pages.scales is None:
        return pages, keys, values
    k, v = dequantised(pages if spec is None else build(None))

    def of_sequences(paged):
        rows = paged.swapaxes(1, 2)  # [pages, page_size, kv_heads, dim]
        return tuple(
            np.concatenate([rows[:0].reshape(0, *rows.shape[2:]), *rows[ids]])[:n]
            for ids, n in zip(page_lists, workload.kv_lens, strict=True)
        )

    return with_any_integers(pages), of_sequences(k), of_sequences(v)


def dequantised(pages: KVPages) -> tuple[np.ndarray, np.ndarray]:
    """K and V of quantised pages, `[pages, kv_heads, page_size, dim]`, float64: `stored * scale`, from the bytes."""
    stored, scales, layout = np.asarray(pages.data), np.asarray(pages.scales, np.float64), pages.layout
    if layout.dtype == "int4":
        stored = np.concatenate([stored & 0xF, (stored >> 4) & 0xF], axis=-1)  # the low nibbles are the first lanes
        stored = np.where(stored < 8, stored, stored - 16)
    stored = stored.astype(np.float64)
    kinds = [scales[:, :, 0, kind * pages.page_size :][..., : pages.page_size, None] for kind in (0, 1 - layout.latent)]
    v = stored[..., layout.v_start : layout.v_start + layout.v_dim]
    return stored[..., : layout.k_dim] * kinds[0], v * kinds[1]


def with_any_integers(pages: KVPages) -> KVPages:
    """Quantised pages with random integers, which cannot be NaN, in places whose scales are NaN."""
    if pages.data.dtype != jnp.int8:
        return pages
    unread = np.isnan(np.asarray(pages.scales[:, :, 0, : pages.page_size]))[..., None]
    nonsense = np.random.default_rng(1).integers(-128, 128, pages.data.shape, np.int8)
    return dataclasses.replace(pages, data=jnp.asarray(np.where(unread, nonsense, pages.data)))


def fill_pages(workload: Workload, page_lists, rows, spec: AttentionSpec | None) -> np.ndarray:
    """`[kv_heads, pages, page_size, dim]` with each sequence's entries in its pages, and NaN everywhere else."""
    size, dim = workload.page_size, rows[0].shape[2] if rows else workload.head_dim
    paged = np.full((workload.num_pages, size, workload.kv_heads, dim), np.nan)
    for seq, pages in enumerate(page_lists):
        for index in range(first_page(workload, seq, spec), len(pages)):
            held = rows[seq][index * size : (index + 1) * size]
            paged[pages[index], : len(held)] = held
    return paged.transpose(2, 0, 1, 3)


def first_page(workload: Workload, seq: int, spec: AttentionSpec | None) -> int:
    """The index of the sequence's first page with a key that some row may see."""
    if spec is None or spec.sliding_window is None:
        return 0
    return max(0, workload.first_position(seq) - spec.sliding_window + 1) // workload.page_size


def attend_densely(case: Case, spec: AttentionSpec) -> tuple[np.ndarray, np.ndarray]:
    """The oracle: `softmax(q k^T) v` over each sequence's keys and values in plain order, float64.

    Returns the output and the log-sum-exp.
    """
    q = np.asarray(case.q, np.float64)
    out, lse = np.zeros((*q.shape[:2], case.workload.value_dim)), np.full(q.shape[:2], -np.inf)
    for seq, row in token_places(case.workload):
        rows = slice(row, row + case.workload.q_lens[seq])
        out[rows], lse[rows] = attend_one(
            q[rows],
            case.keys[seq],
            case.values[seq],
            spec,
            heads=case.heads,
            t0=case.workload.first_position(seq),
            tree=None if case.trees is None else case.trees[rows],
        )
    return out, lse


def assert_equals_oracle(
    case: Case, spec: AttentionSpec, *, backend: str | Backend, block_sizes: BlockSizes | None = None
):
    """The output agrees with the oracle to the tolerance of q's type, and the log-sum-exp to that of float32."""
    cut = get_backend(backend)
    if block_sizes is not None:
        cut = dataclasses.replace(cut, block_sizes=block_sizes)
    out, lse = attend(case.q, case.pages, case.batch, spec, case.heads, backend=cut, return_lse=True)
    expected, expected_lse = attend_densely(case, spec)
    assert (out.dtype, lse.dtype) == (case.q.dtype, case.q.dtype if case.q.dtype == "float64" else "float32")
    assert_rows_close(out, expected, case.q.dtype)
    assert_lse_close(lse, expected_lse, case.q.dtype if cut.name.startswith("tpu") else lse.dtype)
