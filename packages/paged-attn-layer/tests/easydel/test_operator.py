import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import TOLERANCE, Step
from numpy.testing import assert_allclose, assert_array_equal

from paged_attn_layer import AttentionMetadata, AttentionRegistry, PagedAttn, attend
from paged_attn_layer._src.easydel import operator as operator_module
from paged_cache import PagedAttentionMetadata
from paged_kernels import AttentionSpec, paged_attention

CHUNK = 8
PREFILL = Step(kv_lens=(13,), q_lens=(6,))  # the second chunk of a prompt: 6 tokens in CHUNK rows
DECODE = Step(kv_lens=(9, 1, 21), q_lens=(1, 1, 1))
MIXED = Step(kv_lens=(13, 9, 1, 21), q_lens=(6, 1, 1, 1))
RAGGED = Step(kv_lens=(5, 20, 9), q_lens=(5, 1, 7))

forward = jax.jit(lambda impl, *args: impl(*args), static_argnums=0)


def table(page_lists, width=4):
    return jnp.array([pages + [0] * (width - len(pages)) for pages in page_lists], jnp.int32)


def prefill_part(step):
    start = step.kv_lens[0] - step.q_lens[0]
    return {
        "prefill_length": jnp.int32(step.kv_lens[0]),
        "prefill_position": jnp.arange(start, start + CHUNK, dtype=jnp.int32),
        "prefill_page_table": table(step.page_lists[:1])[0],
    }


def decode_part(kv_lens, page_lists):
    """The slots with an idle one before the last."""
    positions = [n - 1 for n in kv_lens]
    return {
        "decodes_position": jnp.array([*positions[:-1], -1, positions[-1]], jnp.int32),
        "decodes_page_table": table([*page_lists[:-1], [5, 6, 7, 8], page_lists[-1]]),
    }


def prefill_case():
    rows = [x[None] for x in PREFILL.rows(CHUNK)]
    return PREFILL, rows, PagedAttentionMetadata(**prefill_part(PREFILL)), PREFILL.expected(CHUNK)[None]


def with_idle_slot(x, fill):
    return jnp.concatenate([x[:-1], jnp.full_like(x[:1], fill), x[-1:]])


def decode_case():
    rows = [with_idle_slot(x, np.nan)[:, None] for x in DECODE.rows()]
    metadata = PagedAttentionMetadata(**decode_part(DECODE.kv_lens, DECODE.page_lists))
    return DECODE, rows, metadata, with_idle_slot(DECODE.expected(), 0)[:, None]


def mixed_case():
    """The chunk's 6 tokens, its 2 rows of padding, then 3 slots and an idle one."""

    def lay(x, fill):
        return jnp.concatenate([x[:6], jnp.full_like(x[:2], fill), with_idle_slot(x[6:], fill)])[:, None]

    parts = prefill_part(MIXED) | decode_part(MIXED.kv_lens[1:], MIXED.page_lists[1:])
    return MIXED, [lay(x, np.nan) for x in MIXED.rows()], PagedAttentionMetadata(**parts), lay(MIXED.expected(), 0)


def ragged_case():
    return RAGGED, RAGGED.rows(16), RAGGED.batch, RAGGED.expected(16)


CASES = {"prefill": prefill_case, "decode": decode_case, "mixed": mixed_case, "ragged": ragged_case}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]()


def assert_pages_equal(pages, expected):
    assert_array_equal(pages.k, expected.k)
    assert_array_equal(pages.v, expected.v)


@pytest.mark.parametrize("run", [forward, lambda impl, *args: impl(*args)], ids=["jit", "eager"])
def test_it_writes_and_attends_in_every_mode(case, run):
    step, rows, metadata, expected = case
    output = run(PagedAttn(), *rows, step.view(), metadata)
    assert output.attention_outputs.shape == rows[0].shape
    assert output.attention_weights is None
    assert_allclose(output.attention_outputs, expected, **TOLERANCE)
    assert_pages_equal(output.cache_view.pages, step.pages(with_new=True))


def test_it_agrees_with_layer_one_s_reference():
    q, k, v = RAGGED.rows(16)
    output = forward(PagedAttn(), q, k, v, RAGGED.view(), RAGGED.batch)
    expected = paged_attention(q, RAGGED.pages(with_new=True), RAGGED.batch, AttentionSpec(), backend="reference")
    assert_allclose(output.attention_outputs, expected, **TOLERANCE)


def test_the_output_carries_the_cache_and_the_callers_view_is_unchanged(case):
    step, rows, metadata, _ = case
    view = step.view()
    before = np.array(view.pages.data)
    output = forward(PagedAttn(), *rows, view, metadata)
    assert_array_equal(view.pages.data, before)
    assert_pages_equal(output.cache_view.pages, step.pages(with_new=True))
    assert jax.tree.structure(output.cache_view) == jax.tree.structure(view)


def test_without_keys_and_values_it_reads_only(case):
    step, rows, metadata, expected = case
    view = step.view(with_new=True)
    output = forward(PagedAttn(), rows[0], None, None, view, metadata)
    assert_allclose(output.attention_outputs, expected, **TOLERANCE)
    assert_array_equal(output.cache_view.pages.data, view.pages.data)


@pytest.mark.parametrize("missing", ["k", "v"])
def test_keys_without_values_are_refused(missing):
    q, k, v = RAGGED.rows()
    kv = {"k": k, "v": v, missing: None}
    with pytest.raises(ValueError, match=f"{missing} is None but . is not; give both"):
        PagedAttn()(q, kv["k"], kv["v"], RAGGED.view(), RAGGED.batch)


def backend_asked_for(monkeypatch, forward):
    """The backend that a `forward_*` asks `attend` for."""
    asked = []

    def spy(*args, backend, **options):
        asked.append(backend)
        return attend(*args, backend="reference", **options)

    step, rows, metadata, expected = mixed_case()
    monkeypatch.setattr(operator_module, "attend", spy)
    output = forward(*rows, step.view(), metadata)
    assert_allclose(output.attention_outputs, expected, **TOLERANCE)
    return asked


@pytest.mark.parametrize(
    ("name", "platform", "backend"),
    [
        ("native", "cpu", "xla"),
        ("cpu", "cpu", None),  # the kernels' own first choice
        ("cpu", "gpu", "xla"),
        ("gpu", "gpu", None),
        ("gpu", "cpu", "xla"),
        ("cuda", "gpu", None),
        ("rocm", "gpu", None),
        ("tpu", "cpu", "tpu"),
        ("tpu", "tpu", "tpu"),
    ],
)
def test_each_forward_asks_for_a_backend_of_its_own(monkeypatch, name, platform, backend):
    monkeypatch.setattr(operator_module, "platform_of", lambda mesh: platform)
    assert backend_asked_for(monkeypatch, getattr(PagedAttn(), f"forward_{name}")) == [backend]
    given = PagedAttn(AttentionMetadata(backend="tpu_interpret"))
    assert backend_asked_for(monkeypatch, getattr(given, f"forward_{name}")) == ["tpu_interpret"]


@pytest.mark.parametrize("platform", ["cpu", "gpu", "cuda", "rocm"])
def test_each_platform_runs_and_is_right(platform):
    step, rows, metadata, expected = mixed_case()
    output = forward(PagedAttn(AttentionMetadata(platform=platform)), *rows, step.view(), metadata)
    assert_allclose(output.attention_outputs, expected, **TOLERANCE)


def test_the_backend_asked_for_is_the_one_that_computes():
    step, rows, metadata, _ = ragged_case()

    def program(backend):
        impl = PagedAttn(AttentionMetadata(backend=backend))
        return str(jax.make_jaxpr(impl)(*rows, step.view(), metadata))

    assert "pallas_call" in program("tpu_interpret")
    assert "pallas_call" not in program("xla")
    assert program("xla") != program("reference")


def test_forward_tpu_asks_for_the_tpu_kernels_alone():
    with pytest.raises(ValueError, match="backend='tpu' cannot run here"):
        PagedAttn().forward_tpu(*RAGGED.rows(), RAGGED.view(), RAGGED.batch)


@pytest.mark.parametrize("backend", ["tpu_interpret", "reference"])
def test_forward_tpu_is_right_by_the_backend_given(backend):
    step = Step(kv_lens=(20, 17), q_lens=(4, 1), head_dim=64, page_size=16, num_pages=8)
    impl = PagedAttn(AttentionMetadata(platform="tpu", backend=backend))
    output = forward(impl, *step.rows(8), step.view(), step.batch)
    assert_allclose(output.attention_outputs, step.expected(8), **TOLERANCE)
    assert_pages_equal(output.cache_view.pages, step.pages(with_new=True))


def test_log_sum_exp_only_where_asked_for(case):
    step, rows, metadata, _ = case
    assert forward(PagedAttn(), *rows, step.view(), metadata).lse is None
    output = PagedAttn()(*rows, step.view(), metadata, return_lse=True)
    assert output.lse.shape == rows[0].shape[:-1]


OPTIONS = {
    "softmax_scale": (0.3, {"scale": 0.3}),
    "soft_cap": (0.7, {"soft_cap": 0.7}),
    "sliding_window": (3, {"sliding_window": 3}),
    "causal": (False, {"causal": False}),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("by_call", [True, False], ids=["call", "metadata"])
def test_every_option_reaches_the_kernel(name, by_call):
    value, dense = OPTIONS[name]
    q, k, v = RAGGED.rows()
    impl = PagedAttn() if by_call else PagedAttn(AttentionMetadata(**{name: value}))
    output = impl(q, k, v, RAGGED.view(), RAGGED.batch, **({name: value} if by_call else {}))
    assert_allclose(output.attention_outputs, RAGGED.expected(**dense), **TOLERANCE)
    assert np.abs(RAGGED.expected(**dense) - RAGGED.expected()).max() > 0.01  # or the test would say nothing


def test_a_call_s_option_comes_before_the_metadata_s():
    q, k, v = RAGGED.rows()
    output = PagedAttn(AttentionMetadata(softmax_scale=9.0))(q, k, v, RAGGED.view(), RAGGED.batch, softmax_scale=0.3)
    assert_allclose(output.attention_outputs, RAGGED.expected(scale=0.3), **TOLERANCE)


@pytest.mark.parametrize("name", ["bias", "mask", "segment_ids", "dropout_prob"])
def test_an_option_that_it_does_not_have_is_an_error(name):
    with pytest.raises(TypeError, match=name):
        PagedAttn()(*RAGGED.rows(), RAGGED.view(), RAGGED.batch, **{name: None})
    with pytest.raises(TypeError, match=name):
        AttentionMetadata(**{name: None})


def test_attention_weights_are_refused_not_left_out():
    with pytest.raises(NotImplementedError, match="weights over a paged cache are never materialised"):
        PagedAttn()(*RAGGED.rows(), RAGGED.view(), RAGGED.batch, return_attention_weights=True)


@pytest.mark.parametrize(("runtime_dtype", "expected"), [(None, jnp.bfloat16), (jnp.float32, jnp.float32)])
def test_the_output_is_in_the_queries_dtype_or_the_runtime_s(runtime_dtype, expected):
    q, k, v = RAGGED.rows()
    impl = PagedAttn(AttentionMetadata(runtime_dtype=runtime_dtype))
    out = impl(q.astype(jnp.bfloat16), k, v, RAGGED.view(), RAGGED.batch).attention_outputs
    assert out.dtype == expected
    assert_allclose(out.astype(jnp.float32), RAGGED.expected(), atol=0.03)


def test_it_is_created_by_its_name():
    q, k, v = RAGGED.rows()
    impl = AttentionRegistry.create("paged_attention", AttentionMetadata(backend="reference"))
    output = impl(q, k, v, RAGGED.view(), RAGGED.batch)
    assert_allclose(output.attention_outputs, RAGGED.expected(), **TOLERANCE)


def test_chunk_by_chunk_is_the_same_as_at_once():
    whole = Step(kv_lens=(19,), q_lens=(19,))
    q, k, v = whole.rows()
    view, outs = whole.view(), []
    for start in range(0, 19, CHUNK):
        n = min(CHUNK, 19 - start)
        chunk = [jnp.pad(x[start : start + n], ((0, CHUNK - n), (0, 0), (0, 0)))[None] for x in (q, k, v)]
        metadata = PagedAttentionMetadata(
            prefill_length=jnp.int32(start + n),
            prefill_position=jnp.arange(start, start + CHUNK, dtype=jnp.int32),
            prefill_page_table=table(whole.page_lists)[0],
        )
        output = forward(PagedAttn(), *chunk, view, metadata)
        view = output.cache_view
        outs.append(output.attention_outputs[0, :n])
    assert_allclose(jnp.concatenate(outs), whole.expected(), **TOLERANCE)
