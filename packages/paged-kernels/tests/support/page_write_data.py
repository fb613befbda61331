"""Page writes for tests: pages full of noise, and the result of a plain double loop.

Each unwritten value or scale is a NaN with its own payload, or random bits if its type has no payloads. So a byte that
was moved, or computed with, shows.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from paged_kernels import KVPages, RaggedBatch

TOKENS, SEQS, PAGES_PER_SEQ, NUM_PAGES, KV_HEADS, HEAD_DIM = 24, 5, 3, 20, 2, 64
"""One shape for all cases, so that each backend is compiled once for each dtype and page size."""
KINDS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "int8"},
    "float8_e4m3fn": {"dtype": "float8_e4m3fn"},
    "float8_e5m2": {"dtype": "float8_e5m2"},
    "int4": {"dtype": "int4"},
    "aligned": {"dtype": "bfloat16", "head_dim": 80},
    "v_longer": {"dtype": "bfloat16", "head_dim": 40, "v_head_dim": 96},
    "latent": {"dtype": "bfloat16", "head_dim": 136, "v_head_dim": 128, "latent": True},
    "latent_int8": {"dtype": "int8", "head_dim": 136, "v_head_dim": 128, "latent": True},
}
"""Every kind of entry, as arguments of `KVPages.zeros`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Write:
    """The sequences of one write, by their lengths."""

    kv_lens: tuple[int, ...]
    q_lens: tuple[int, ...]
    page_ids: dict[tuple[int, int], int] = dataclasses.field(default_factory=dict)
    """Wrong entries of the page table, by `(sequence, index)`."""


WRITES = {
    "prefill": Write(kv_lens=(20,), q_lens=(20,)),
    "one_token": Write(kv_lens=(1,), q_lens=(1,)),
    "prompts": Write(kv_lens=(16, 1, 7), q_lens=(16, 1, 7)),
    "chunks": Write(kv_lens=(37, 16, 33), q_lens=(9, 4, 11)),
    "ends_with_a_page": Write(kv_lens=(16, 32), q_lens=(3, 17)),
    "starts_with_a_page": Write(kv_lens=(17, 40), q_lens=(1, 8)),
    "whole_pages": Write(kv_lens=(24, 32), q_lens=(8, 16)),
    "decode": Write(kv_lens=(18, 1, 48, 16, 17), q_lens=(1, 1, 1, 1, 1)),
    "mixed": Write(kv_lens=(29, 5, 48, 9), q_lens=(18, 1, 1, 1)),
    "gaps": Write(kv_lens=(20, 0, 31, 0, 8), q_lens=(7, 5, 9, 2, 1)),
    "no_rows": Write(kv_lens=(20, 24, 11), q_lens=(4, 0, 5)),
    "all_gaps": Write(kv_lens=(0, 0), q_lens=(3, 0)),
    "empty": Write(kv_lens=(), q_lens=()),
    "negative_positions": Write(kv_lens=(3, 2), q_lens=(7, 9)),
    "past_the_table": Write(kv_lens=(53, 60), q_lens=(10, 6)),
    "null_page": Write(kv_lens=(20, 30), q_lens=(12, 4), page_ids={(0, 0): 0}),
    "no_such_page": Write(kv_lens=(20, 30), q_lens=(12, 4), page_ids={(0, 1): NUM_PAGES, (1, 1): -1}),
}


@st.composite
def ragged_writes(draw: st.DrawFn) -> Write:
    """Any write that fits the shapes: sequences of any length, gaps, positions outside the page table."""
    kv_lens, q_lens = [], []
    for _ in range(draw(st.integers(0, SEQS))):
        q_lens.append(draw(st.integers(0, min(TOKENS - sum(q_lens), 19))))
        kv_lens.append(draw(st.just(0) | st.integers(max(0, q_lens[-1] - 1), 50)))
    return Write(kv_lens=tuple(kv_lens), q_lens=tuple(q_lens))


def make_batch(write: Write, *, max_q_len: int | None = None, seed: int = 0) -> RaggedBatch:
    """Returns the write's batch: shuffled pages, each owned by one sequence, and nonsense in unused entries."""
    rng = np.random.default_rng(seed)
    count = len(write.kv_lens)
    page_table = 1 + rng.permutation(NUM_PAGES - 1)[: SEQS * PAGES_PER_SEQ].reshape(SEQS, PAGES_PER_SEQ)
    for at, page in write.page_ids.items():
        page_table[at] = page
    kv_lens = np.full(SEQS, 7)
    kv_lens[:count] = write.kv_lens
    starts = np.full(SEQS + 1, 3)
    starts[: count + 1] = np.cumsum([0, *write.q_lens])
    return RaggedBatch(
        page_table=jnp.asarray(page_table, jnp.int32),
        kv_lens=jnp.asarray(kv_lens, jnp.int32),
        cu_q_lens=jnp.asarray(starts, jnp.int32),
        num_seqs=jnp.int32(count),
        max_q_len=max_q_len,
    )


def noise_pages(page_size: int, kind: str = "float32", num_pages: int = NUM_PAGES) -> KVPages:
    """Pages of noise: quiet NaNs, told apart by their payloads if the type has them."""
    shapes = pages_shape(page_size, kind, num_pages)
    return jax.tree.map(lambda leaf: jnp.asarray(noise(leaf.shape, leaf.dtype)), shapes)


def finite_pages(page_size: int, kind: str) -> KVPages:
    """Pages of numbers, for XLA on CPU. It moves bfloat16 (before jax 0.12) and float8 through wider types."""
    shapes, rng = pages_shape(page_size, kind), np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(10 * rng.normal(size=leaf.shape)).astype(leaf.dtype), shapes)


def pages_shape(page_size: int, kind: str, num_pages: int = NUM_PAGES) -> KVPages:
    """The shapes of such pages."""
    return KVPages.shapes(num_pages, page_size, KV_HEADS, **{"head_dim": HEAD_DIM, **KINDS[kind]})


def noise(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Values with distinct bits."""
    payload_bits, quiet = {"float32": (22, 0x7FC00000), "bfloat16": (6, 0x7FC0)}.get(dtype.name, (8, 0))
    payload = np.random.default_rng(1).integers(0, 1 << payload_bits, shape)
    return (quiet | payload).astype(f"uint{8 * dtype.itemsize}").view(dtype)


def make_rows(
    pages: KVPages, dtype: str | None = None, tokens: int = TOKENS, seed: int = 2
) -> tuple[jax.Array, jax.Array | None]:
    """New keys and values for these pages. Without scales, also an infinity, a NaN and a minus zero."""
    rng = np.random.default_rng(seed)
    k, v = (rng.normal(size=(tokens, KV_HEADS, dim)) for dim in (pages.head_dim, pages.v_head_dim))
    if pages.scales is None:
        k[0, 0, :4] = np.inf, -np.inf, np.nan, -0.0
    dtype = dtype or ("bfloat16" if pages.dtype.name == "bfloat16" else "float32")
    return jnp.asarray(k, dtype), None if pages.layout.latent else jnp.asarray(v, dtype)


def bits(array: jax.Array) -> np.ndarray:
    """The array's bits, as unsigned integers."""
    host = np.asarray(array)
    return host.view(f"uint{8 * host.dtype.itemsize}")


def written_by_loop(pages: KVPages, k: jax.Array, v: jax.Array | None, batch: RaggedBatch) -> KVPages:
    """The bits of the pages after the write, one row at a time, by the definition."""
    data, scales = (None if array is None else bits(array).copy() for array in (pages.data, pages.scales))
    rows, entry_scales = (None if array is None else bits(array) for array in pages.layout.pack(k, v))
    page_table, kv_lens, starts = (np.asarray(array) for array in (batch.page_table, batch.kv_lens, batch.cu_q_lens))
    for seq in range(int(batch.num_seqs)):
        n = starts[seq + 1] - starts[seq]
        for j in range(n if kv_lens[seq] else 0):
            position = kv_lens[seq] - n + j
            if not 0 <= position < batch.pages_per_seq * pages.page_size:
                continue
            page, slot = page_table[seq, position // pages.page_size], position % pages.page_size
            if 0 < page < pages.num_pages:
                data[page, :, slot] = rows[starts[seq] + j]
                if scales is not None:
                    for kind in range(pages.layout.scales_per_entry):
                        scales[page, :, 0, kind * pages.page_size + slot] = entry_scales[starts[seq] + j, :, kind]
    return dataclasses.replace(pages, data=data, scales=scales)


def assert_written(got: KVPages, pages: KVPages, k: jax.Array, v: jax.Array | None, batch: RaggedBatch) -> None:
    """Fails unless `got` is `pages` after the write, bit for bit. (A written NaN may have any payload.)"""
    expected = written_by_loop(pages, k, v, batch)
    for name in ("data", "scales") if pages.layout.is_quantised else ("data",):
        after, before, want = (getattr(each, name) for each in (got, pages, expected))
        new_nan = (want != bits(before)) & np.isnan(want.view(before.dtype))
        same = (bits(after) == want) | (new_nan & np.isnan(np.asarray(after)))
        assert same.all(), (
            f"{(~same).sum()} values differ in {name}, pages {sorted(set(np.nonzero(~same)[0].tolist()))}"
        )
