import jax.numpy as jnp
import pytest
from dense import Step

from paged_attn_layer import PagedAttn
from paged_cache import PagedAttentionCache, PagedAttentionMetadata

STEP = Step(kv_lens=(5, 9), q_lens=(5, 1))
POSITIONS = jnp.arange(8, dtype=jnp.int32)
TABLE = jnp.array(STEP.page_lists[0] + [0], jnp.int32)
PREFILL = {"prefill_length": jnp.int32(5), "prefill_position": POSITIONS, "prefill_page_table": TABLE}
DECODES = {"decodes_position": jnp.full(3, -1, jnp.int32), "decodes_page_table": jnp.zeros((3, 2), jnp.int32)}
SHAPES = [
    ("prefill", PREFILL, (8, 1, 4, 16), r"q \(8, 1, 4, 16\) must be \[1, 8, heads, head_dim\] for prefill"),
    ("decode", DECODES, (1, 3, 4, 16), r"must be \[3, 1, heads, head_dim\] for decode"),
    ("mixed", PREFILL | DECODES, (8, 1, 4, 16), r"must be \[11, 1, heads, head_dim\] for mixed"),
    ("axes", PREFILL, (8, 4, 16), r"must be \[1, 8, heads, head_dim\] for prefill"),
    ("heads", PREFILL, (1, 8, 3, 16), "must have a multiple of 2 heads and head_dim 16, as the pages"),
    ("head_dim", PREFILL, (1, 8, 4, 32), "must have a multiple of 2 heads and head_dim 16, as the pages"),
]


@pytest.mark.parametrize(("parts", "shape", "match"), [case[1:] for case in SHAPES], ids=[case[0] for case in SHAPES])
def test_queries_of_another_shape_than_the_step_s_are_refused(parts, shape, match):
    with pytest.raises(ValueError, match=match):
        PagedAttn()(jnp.zeros(shape), None, None, STEP.view(), PagedAttentionMetadata(**parts))


def test_the_queries_of_a_batch_have_three_axes():
    with pytest.raises(ValueError, match=r"must be \[tokens, heads, head_dim\] for a RaggedBatch"):
        PagedAttn()(jnp.zeros((1, 6, 4, 16)), None, None, STEP.view(), STEP.batch)


def test_keys_and_values_that_do_not_fit_queries_or_pages_are_refused():
    q, k, v = STEP.rows()
    with pytest.raises(ValueError, match=r"k \(5, 2, 16\) must be \(6, 2, 16\): the rows of q, and heads and head_dim"):
        PagedAttn()(q, k[:5], v[:5], STEP.view(), STEP.batch)
    with pytest.raises(ValueError, match=r"v \(6, 1, 16\) must be \(6, 2, 16\)"):
        PagedAttn()(q, k, v[:, :1], STEP.view(), STEP.batch)


def test_what_is_no_view_is_refused():
    with pytest.raises(ValueError, match=r"cache_view is a PagedAttentionCache; it must be one layer's .* cache.views"):
        PagedAttn()(STEP.rows()[0], None, None, PagedAttentionCache((STEP.view(),)), STEP.batch)


def test_what_is_no_metadata_is_refused():
    with pytest.raises(ValueError, match="cache_metadata is a dict; it must be a PagedAttentionMetadata or a Ragged"):
        PagedAttn()(jnp.zeros((6, 4, 16)), None, None, STEP.view(), {})
