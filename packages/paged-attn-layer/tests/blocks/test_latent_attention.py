import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import TOLERANCE, attention
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

from paged_attn_layer._src.blocks.latent_attention import LatentAttention, LatentAttentionConfig
from paged_attn_layer._src.blocks.norm import NormConfig
from paged_attn_layer._src.blocks.rope import RopeConfig
from paged_cache import KVShape, PagedAttentionCacheView
from paged_kernels import KVPages, RaggedBatch

CONFIG = LatentAttentionConfig(
    hidden_size=24,
    num_heads=3,
    q_rank=12,
    kv_rank=20,
    nope_dim=8,
    rope_dim=6,
    v_head_dim=10,
    latent_norm=NormConfig(eps=1e-3),
    rope=RopeConfig(theta=50.0, interleaved=True),
)
PAGES = [[3, 5]]

step = jax.jit(lambda graph, state, *args: nnx.merge(graph, state)(*args), static_argnums=0)


def make(**changes):
    """A layer whose weights are all of the size that makes attention peaked."""
    layer, rng = LatentAttention(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0)), np.random.default_rng(1)
    for _, weight in nnx.to_flat_state(nnx.state(layer)):
        drawn = rng.standard_normal(weight[...].shape) * 2 / weight[...].shape[-1] ** 0.5
        weight[...] = jnp.asarray(drawn, jnp.float32)
    return layer


def empty_view():
    kv = CONFIG.kv
    pages = KVPages.zeros(8, 8, 1, kv.head_dim, jnp.float32, v_head_dim=kv.v_head_dim, latent=True)
    return PagedAttentionCacheView(pages)


def hidden_of(tokens):
    return np.random.default_rng(2).standard_normal((tokens, CONFIG.hidden_size)).astype(np.float32)


def dense_layer(layer, hidden):
    """The layer on one whole sequence in float64: keys and values of every head are made, and nothing is absorbed."""
    config, n = layer.config, len(hidden)

    def weight(param):
        return np.asarray(param[...], np.float64)

    def project(linear, x):
        return x @ weight(linear.kernel) + (0 if linear.bias is None else weight(linear.bias))

    def normed(norm, x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.latent_norm.eps) * weight(norm.scale)

    def turned(x):
        turn = np.arange(n)[:, None, None] * config.rope.theta ** (-np.arange(0, config.rope_dim, 2) / config.rope_dim)
        z = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * turn)
        return np.stack([z.real, z.imag], axis=-1).reshape(x.shape)

    if config.q_rank is None:
        q = project(layer.q_proj, hidden)
    else:
        q = project(layer.q_b_proj, normed(layer.q_a_norm, project(layer.q_a_proj, hidden)))
    q_nope, q_rot = np.split(q.reshape(n, config.num_heads, -1), [config.nope_dim], axis=-1)
    latent, k_rot = np.split(project(layer.kv_a_proj, hidden), [config.kv_rank], axis=-1)
    latent, k_rot = normed(layer.kv_a_norm, latent), np.repeat(turned(k_rot[:, None]), config.num_heads, axis=1)
    k_nope, v = (np.einsum("tr,hdr->thd", latent, weight(up)) for up in (layer.k_up, layer.v_up))
    q, k = np.concatenate([q_nope, turned(q_rot)], axis=-1), np.concatenate([k_nope, k_rot], axis=-1)
    return project(layer.o_proj, attention(q, k, v, scale=config.softmax_scale).reshape(n, -1))


@pytest.mark.parametrize("changes", [{}, {"q_rank": None, "softmax_scale": 0.5}, {"use_bias": True}])
def test_chunks_and_single_tokens_are_the_expanded_layer(changes):
    layer, hidden, view = make(**changes), hidden_of(11), empty_view()
    outs = []
    for start, end in ((0, 5), (5, 10), (10, 11)):
        batch = RaggedBatch.from_lists(PAGES, [end], [end - start])
        positions = jnp.arange(start, end, dtype=jnp.int32)
        out, view = step(*nnx.split(layer), hidden[start:end], positions, view, batch)
        outs.append(out)
    assert_allclose(jnp.concatenate(outs), dense_layer(layer, hidden), **TOLERANCE)


def test_a_prepared_batch_gives_the_same():
    layer, hidden = make(), hidden_of(5)
    batch = RaggedBatch.from_lists(PAGES, [5], [5])
    prepared = layer.prepare(batch, empty_view(), hidden)
    out, _ = step(*nnx.split(layer), hidden, jnp.arange(5, dtype=jnp.int32), empty_view(), prepared)
    assert_allclose(out, dense_layer(layer, hidden), **TOLERANCE)


def test_on_a_mesh_each_device_has_some_heads():
    """The latent vectors are on every device, and the sum over heads is all that is communicated."""
    mesh = Mesh(np.array(jax.devices()[:3]), ("tp",))
    layer, hidden = make(), hidden_of(5)
    specs = {"q_b_proj": P(None, "tp"), "k_up": P("tp"), "v_up": P("tp"), "o_proj": P("tp", None)}
    graph, state = nnx.split(layer)
    for path, weight in nnx.to_flat_state(state):
        weight.set_value(jax.device_put(weight[...], NamedSharding(mesh, specs.get(path[0], P()))))
    view = dataclasses.replace(empty_view(), mesh=mesh)
    view, hidden = jax.device_put((view, hidden), NamedSharding(mesh, P()))
    batch = RaggedBatch.from_lists(PAGES, [5], [5])
    prepared = layer.prepare(batch, view, hidden)
    compiled = step.lower(graph, state, hidden, jnp.arange(5, dtype=jnp.int32), view, prepared).compile()
    out, _ = compiled(state, hidden, jnp.arange(5, dtype=jnp.int32), view, prepared)
    assert_allclose(out, dense_layer(layer, np.asarray(hidden)), **TOLERANCE)
    assert len(re.findall(r" all-reduce(-start)?\(", compiled.as_text())) == 1
    assert "all-gather" not in compiled.as_text()


def test_a_token_is_one_latent_vector_and_its_value_is_the_start():
    assert CONFIG.kv == KVShape(num_kv_heads=1, head_dim=26, v_head_dim=20, latent=True)


def test_weights_have_the_names_and_shapes_that_checkpoints_convert_to():
    state = nnx.state(make(use_bias=True))
    assert {"/".join(path): leaf[...].shape for path, leaf in nnx.to_flat_state(state)} == {
        "q_a_proj/kernel": (24, 12),
        "q_a_proj/bias": (12,),
        "q_a_norm/scale": (12,),
        "q_b_proj/kernel": (12, 42),
        "kv_a_proj/kernel": (24, 26),
        "kv_a_proj/bias": (26,),
        "kv_a_norm/scale": (20,),
        "k_up": (3, 8, 20),
        "v_up": (3, 10, 20),
        "o_proj/kernel": (30, 24),
        "o_proj/bias": (24,),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_rank": 0}, "kv_rank=0 must be at least 1"),
        ({"q_rank": 0}, "q_rank=0 must be at least 1"),
        ({"rope_dim": 5}, "head_dim=5 must be even"),
    ],
)
def test_sizes_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(CONFIG, **changes)
