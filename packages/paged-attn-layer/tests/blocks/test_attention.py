import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import TOLERANCE, attention
from flax import nnx
from jax.sharding import Mesh
from numpy.testing import assert_allclose

from paged_attn_layer import AttentionConfig, PagedAttention, RopeConfig
from paged_attn_layer._src.blocks.attention import QueryGrowth
from paged_attn_layer._src.blocks.norm import NormConfig
from paged_cache import PagedAttentionCacheView
from paged_kernels import KVPages, RaggedBatch

CONFIG = AttentionConfig(hidden_size=24, num_heads=4, num_kv_heads=2, head_dim=16)
TOKENS = 8
PAGES = [[3, 5]]

step = jax.jit(lambda graph, state, *args: nnx.merge(graph, state)(*args), static_argnums=0)


def run(layer, *args):
    return step(*nnx.split(layer), *args)


def make(**changes):
    return PagedAttention(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0))


def empty_view():
    return PagedAttentionCacheView(KVPages.zeros(8, 8, 2, 16, jnp.float32))


def hidden_of(tokens, seed=0):
    return np.random.default_rng(seed).standard_normal((tokens, CONFIG.hidden_size)).astype(np.float32)


def dense_layer(layer, hidden):
    """The layer on one whole sequence in float64, with the pairs of a head turned as complex numbers."""
    config = layer.config

    def project(linear, x):
        bias = 0 if linear.bias is None else np.asarray(linear.bias[...], np.float64)
        return x @ np.asarray(linear.kernel[...], np.float64) + bias

    def turned(x):
        half = config.head_dim // 2
        turn = np.arange(len(x))[:, None] * config.rope.theta ** (-np.arange(half) / half)
        z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * turn)[:, None]
        return np.concatenate([z.real, z.imag], axis=-1)

    q, k, v = (
        project(p, hidden).reshape(len(hidden), -1, config.head_dim) for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    if config.rope is not None:
        q, k = turned(q), turned(k)
    options = {"scale": config.softmax_scale, "soft_cap": config.soft_cap, "sliding_window": config.sliding_window}
    options |= {"sinks": layer.sinks[...] if config.sinks else None, "alibi_slopes": config.alibi_slopes}
    return project(layer.o_proj, attention(q, k, v, **options).reshape(len(hidden), -1))


def prefill(layer, hidden, run=run):
    positions = jnp.arange(len(hidden), dtype=jnp.int32)
    batch = RaggedBatch.from_lists(PAGES, [len(hidden)], [len(hidden)])
    return run(layer, hidden, positions, empty_view(), batch)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope": RopeConfig(theta=500.0), "num_heads": 6},
        {"qkv_bias": True, "out_bias": True},
        {"softmax_scale": 0.5, "soft_cap": 2.0, "sliding_window": 3},
        {"rope": None, "sinks": True, "alibi_slopes": (0.5, 0.25, 0.125, 0.0625)},
    ],
    ids=["plain", "theta", "bias", "options", "sinks-alibi"],
)
def test_a_whole_prompt_is_the_dense_layer(changes):
    layer = make(**changes)
    for linear in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj):
        if linear.bias is not None:
            linear.bias[...] = jnp.linspace(-1, 1, linear.bias.size)  # they start at zero
    if layer.config.sinks:
        layer.sinks[...] = jnp.linspace(-1, 2, CONFIG.num_heads)
    hidden = hidden_of(TOKENS)
    out, _ = prefill(layer, hidden)
    assert_allclose(out, dense_layer(layer, hidden), **TOLERANCE)


def test_token_by_token_after_a_prefill_is_the_whole_prompt():
    layer, hidden = make(), hidden_of(11)
    out, view = prefill(layer, hidden[:TOKENS])
    outs = [out]
    for t in range(TOKENS, 11):
        batch = RaggedBatch.from_lists(PAGES, [t + 1], [1], max_q_len=1)
        out, view = run(layer, hidden[t : t + 1], jnp.array([t], jnp.int32), view, batch)
        outs.append(out)
    assert_allclose(jnp.concatenate(outs), dense_layer(layer, hidden), **TOLERANCE)


def test_far_positions_turn_like_near_ones():
    """A prompt of 45 tokens, then three tokens one by one: farther than a fault of the first few pages could hide."""
    layer, hidden, pages = make(), hidden_of(48), [[4, 1, 7, 2, 6, 3]]
    outs, view = [], empty_view()
    for start, end in ((0, 45), (45, 46), (46, 47), (47, 48)):
        batch = RaggedBatch.from_lists(pages, [end], [end - start])
        out, view = run(layer, hidden[start:end], jnp.arange(start, end, dtype=jnp.int32), view, batch)
        outs.append(out)
    assert_allclose(jnp.concatenate(outs), dense_layer(layer, hidden), **TOLERANCE)


def test_eager_is_as_compiled():
    layer, hidden = make(), hidden_of(TOKENS)
    eager, _ = prefill(layer, hidden, run=lambda layer, *args: layer(*args))
    assert_allclose(eager, dense_layer(layer, hidden), **TOLERANCE)


def test_on_a_mesh_it_gives_the_same():
    mesh = Mesh(np.array(jax.devices()[:2]), ("tp",))
    config = dataclasses.replace(CONFIG, sinks=True)  # which start at 0: a logit like any other
    layer, hidden = PagedAttention(config, rngs=nnx.Rngs(0)), hidden_of(TOKENS)
    with jax.set_mesh(mesh):
        out, _ = prefill(layer, hidden)
    assert_allclose(out, dense_layer(layer, hidden), **TOLERANCE)


def test_its_weights_have_the_names_and_shapes_that_checkpoints_convert_to():
    state = nnx.state(make(qkv_bias=True, sinks=True))
    shapes = {"/".join(path): leaf[...].shape for path, leaf in nnx.to_flat_state(state)}
    assert shapes == {
        "q_proj/kernel": (24, 64),
        "q_proj/bias": (64,),
        "k_proj/kernel": (24, 32),
        "k_proj/bias": (32,),
        "v_proj/kernel": (24, 32),
        "v_proj/bias": (32,),
        "o_proj/kernel": (64, 24),
        "sinks": (4,),
    }


@pytest.mark.parametrize(
    ("over", "q_shape", "k_shape"),
    [("head", (16,), (16,)), ("each_head", (4, 16), (2, 16)), ("projection", (64,), (32,))],
)
def test_queries_and_keys_are_normalised_by_head_or_together(over, q_shape, k_shape):
    layer = make(qk_norm=NormConfig(eps=1.0), qk_norm_over=over, rope=None)
    assert (layer.q_norm.scale[...].shape, layer.k_norm.scale[...].shape) == (q_shape, k_shape)
    layer.q_norm.scale[...] = scale = jax.random.normal(jax.random.key(0), q_shape)
    hidden = jnp.asarray(hidden_of(TOKENS))
    rows = np.asarray(layer.q_proj(hidden), np.float64).reshape(TOKENS, *((-1,) if over == "projection" else (4, 16)))
    expected = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 1.0) * np.asarray(scale)
    actual = layer._queries(hidden, jnp.zeros(TOKENS, jnp.int32))
    assert_allclose(actual.reshape(rows.shape), expected, atol=1e-5)


def test_a_layer_built_again_shares_the_compiled_step():
    assert nnx.split(make())[0] == nnx.split(make())[0]
    assert hash(nnx.split(make())[0]) == hash(nnx.split(make())[0])


def test_a_factor_that_grows_starts_at_a_token():
    growth = QueryGrowth(beta=0.5, tokens=4)
    assert_allclose(growth.factor(jnp.array([0, 3, 4, 8])), [1, 1, 1 + 0.5 * np.log(2), 1 + 0.5 * np.log(3)], rtol=1e-6)
    with pytest.raises(ValueError, match="tokens=0 must be at least 1"):
        QueryGrowth(beta=0.5, tokens=0)


def test_a_layer_that_reads_the_keys_of_another_writes_none():
    layer, hidden = make(stores_kv=False), hidden_of(TOKENS)
    _, view = prefill(make(), hidden)
    assert {path[0] for path, _ in nnx.to_flat_state(nnx.state(layer))} == {"q_proj", "o_proj"}
    batch = RaggedBatch.from_lists(PAGES, [TOKENS], [TOKENS])
    out, after = run(layer, hidden, jnp.arange(TOKENS, dtype=jnp.int32), view, batch)
    np.testing.assert_array_equal(after.pages.data, view.pages.data)
    assert np.abs(out).max() > 0


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_kv_heads": 3}, "num_heads=4 must be a multiple of num_kv_heads=3"),
        ({"head_dim": 0}, "head_dim=0 must be at least 1"),
        ({"qk_norm_over": "all"}, "qk_norm_over='all' must be 'head', 'each_head' or 'projection'"),
        ({"rope": RopeConfig(rotary_dim=32)}, "rotary_dim=32 must be at most head_dim=16"),
        ({"alibi_slopes": (0.5, 0.25)}, "alibi_slopes has 2 entries; it must have num_heads=4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(CONFIG, **changes)
