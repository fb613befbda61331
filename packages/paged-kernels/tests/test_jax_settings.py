"""Every public call works under the settings that careful projects switch on, and gives the same results.

All tests run with `jax_numpy_rank_promotion="raise"` and `jax_numpy_dtype_promotion="strict"` (conftest.py).
"""

import functools

import jax
import jax.numpy as jnp
import jax_settings
import numpy as np
import pytest
from jax_settings import SETTINGS

from paged_kernels import (
    AttentionSpec,
    HeadParams,
    KVPages,
    RaggedBatch,
    check_batch,
    explain_backends,
    merge_attention_states,
    pack_tree_masks,
    paged_attention,
    paged_attention_update,
    pallas_paged_attention,
    pallas_prefill_attention,
    prepare_batch,
    write_kv,
)

pytestmark = pytest.mark.once


TOKENS, Q_HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, NUM_PAGES = 5, 4, 2, 64, 8, 4
SPEC = AttentionSpec(softmax_scale=0.2, sliding_window=9, soft_cap=2.0)
Q_LENS = [2, 1, 1]


def rows(heads: int, seed: int) -> jax.Array:
    data = np.random.default_rng(seed).standard_normal((TOKENS, heads, HEAD_DIM))
    return jnp.asarray(data, jnp.float32)


def make_batch() -> RaggedBatch:
    """A sequence with two new tokens and a tree mask, a gap, a sequence in decode, and a row of padding."""
    batch = RaggedBatch.from_lists([[3, 1], [], [2]], kv_lens=[11, 0, 2], q_lens=Q_LENS, max_q_len=2)
    tree = pack_tree_masks([np.tri(2), None, None], Q_LENS, tokens=TOKENS)
    return RaggedBatch(**vars(batch) | {"tree_mask": jnp.asarray(tree)})


def make_pages(dtype: str) -> KVPages:
    """Pages with numbers in all slots."""
    k, v = np.random.default_rng(1).standard_normal((2, KV_HEADS, NUM_PAGES, PAGE_SIZE, HEAD_DIM))
    return KVPages.from_kv(jnp.asarray(k, jnp.float32), jnp.asarray(v, jnp.float32), dtype)


def call_a_backend(backend: str, dtype: str) -> dict[str, object]:
    """The results of the calls that run on a backend, by name."""
    q, k, v, batch, pages = rows(Q_HEADS, 2), rows(KV_HEADS, 3), rows(KV_HEADS, 4), make_batch(), make_pages(dtype)
    steps = jnp.arange(1, Q_HEADS + 1, dtype=jnp.float32)
    heads = HeadParams(sinks=steps, alibi_slopes=steps / 10)
    check_batch(batch, num_pages=NUM_PAGES, page_size=PAGE_SIZE, tokens=TOKENS)
    prepared = prepare_batch(
        batch, pages, SPEC, tokens=TOKENS, q_heads=Q_HEADS, q_dtype=q.dtype, head_params=heads, backend=backend
    )
    written = write_kv(pages, k, v, prepared)
    return {
        "explained": str(explain_backends(q, pages, batch, SPEC, heads)),
        "prepared": (prepared.attention, prepared.write),
        "written": written,
        "read back": (written.k, written.v),
        "attended": paged_attention(q, written, prepared, SPEC, heads),
        "updated": paged_attention_update(q, k, v, pages, batch, SPEC, heads, backend=backend),
    }


def call_the_others() -> dict[str, object]:
    """The results of the other public calls, by name."""
    q, pages = rows(Q_HEADS, 2), make_pages("float32")
    lengths, table = jnp.array([3, 8, 0, 1, 9], jnp.int32), jnp.array([[1, 2]] * TOKENS, jnp.int32)
    lses = jnp.array([[0, -jnp.inf], [1, -jnp.inf]], jnp.float32)[:, :, None]
    return {
        "zeros": KVPages.zeros(NUM_PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM, "int4"),
        "merged": merge_attention_states(jnp.ones((2, 2, 1, 4), jnp.float32), lses),
        "decode": pallas_paged_attention(q, pages.k, pages.v, lengths, table, pages_per_compute_block=1),
        "prefill": pallas_prefill_attention(q, pages.k, pages.v, lengths[1], table[0]),
    }


plain_results = functools.cache(lambda call, *names: call(*names))
"""The results without a setting, computed once."""


assert_same = functools.partial(jax_settings.assert_same, rtol=1e-5, atol=1e-5)

BACKENDS = {"xla": "int8", "reference": "float32", "tpu_interpret": "float32"}
"""The type of the pages for each backend."""
CASES = [(backend, setting) for backend in BACKENDS for setting in SETTINGS]
CASES.remove(("tpu_interpret", "disable_jit"))  # Pallas's interpreter fills memory with NaN by design


@pytest.mark.parametrize(("backend", "setting"), CASES)
def test_calls_that_run_on_a_backend(backend, setting):
    dtype = BACKENDS[backend]
    expected = plain_results(call_a_backend, backend, dtype)
    with SETTINGS[setting]():
        assert_same(call_a_backend(backend, dtype), expected)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_other_calls(setting):
    expected = plain_results(call_the_others)
    with SETTINGS[setting]():
        assert_same(call_the_others(), expected)
