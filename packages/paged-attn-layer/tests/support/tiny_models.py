"""A small model whose layers differ in all that a cache can differ in, and the same model densely in float64.

It is no decoder of this package: it shows that the engine needs nothing but `CausalLM`. Its layers:

    0   window of 5   2 KV heads of 16                     attention sinks
    1   full          1 KV head of 32, values of 16        soft cap
    2   window of 5   reads the keys and values of layer 0, and writes none
    3   full          latent rows of 24, values their first 16
    4   window of 5   2 KV heads of 16
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from paged_attn_layer import attend, on_mesh
from paged_cache import CacheSpec, KVShape, LayerGroup, PagedAttentionCache
from paged_kernels import AttentionSpec, HeadParams

VOCABULARY, HIDDEN, Q_HEADS = 40, 32, 4


@dataclasses.dataclass(frozen=True)
class Layer:
    """What one layer is."""

    kv: KVShape
    spec: AttentionSpec
    sinks: bool = False
    reads: int | None = None
    """The layer whose keys and values it reads."""

    @property
    def sight(self):
        window = self.spec.sliding_window
        return LayerGroup.full() if window is None else LayerGroup.window(window)


WINDOWED = KVShape(num_kv_heads=2, head_dim=16)
LAYERS = (
    Layer(WINDOWED, AttentionSpec(sliding_window=5), sinks=True),
    Layer(KVShape(num_kv_heads=1, head_dim=32, v_head_dim=16), AttentionSpec(soft_cap=6.0)),
    Layer(WINDOWED, AttentionSpec(sliding_window=5, softmax_scale=0.4), reads=0),
    Layer(KVShape(num_kv_heads=1, head_dim=24, v_head_dim=16, latent=True), AttentionSpec(softmax_scale=0.3)),
    Layer(WINDOWED, AttentionSpec(sliding_window=5)),
)


class EveryKind(nnx.Module):
    """`x += attention_l(x)` for each layer, positions added to `x` before each; then logits of the rows asked for."""

    max_positions = 64
    vocab_size = VOCABULARY
    end_token_ids = frozenset()
    dtype = jnp.float32

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)

        def weight(*shape, size=1.0):
            return nnx.Param(jnp.asarray(rng.standard_normal(shape) * size / np.sqrt(shape[0]), jnp.float32))

        self.embed = weight(VOCABULARY, HIDDEN, size=6.0)
        self.place = weight(self.max_positions, HIDDEN, size=8.0)
        self.q = nnx.List(weight(HIDDEN, Q_HEADS * layer.kv.head_dim, size=2.0) for layer in LAYERS)
        self.k = nnx.List(weight(HIDDEN, layer.kv.num_kv_heads * layer.kv.head_dim, size=2.0) for layer in LAYERS)
        self.v = nnx.List(weight(HIDDEN, layer.kv.num_kv_heads * 16) for layer in LAYERS)
        self.o = nnx.List(weight(Q_HEADS * 16, HIDDEN, size=2.0) for _ in LAYERS)
        self.sinks = weight(Q_HEADS, size=2.0)

    @property
    def cache_spec(self):
        shared = tuple((index, layer.reads) for index, layer in enumerate(LAYERS) if layer.reads is not None)
        return CacheSpec.of_layers([(layer.sight, layer.kv) for layer in LAYERS], shared_layers=shared)

    def __call__(self, token_ids, positions, cache, batches, rows):
        x, views = self.embed[...][token_ids], list(cache.views)
        for index, (layer, place) in enumerate(zip(LAYERS, self.cache_spec.places(), strict=True)):
            q, k, v = self.project(index, x + self.place[...][positions])
            assert place.writes == (layer.reads is None)
            attended = attend(
                q,
                k if place.writes else None,
                v if place.writes and not layer.kv.latent else None,
                on_mesh(views[place.view]),
                batches[place.group],
                layer.spec,
                head_params=HeadParams(sinks=self.sinks[...] if layer.sinks else None),
            )
            views[place.view] = dataclasses.replace(views[place.view], pages=attended.view.pages)
            x = x + attended.out.reshape(len(x), -1) @ self.o[index][...]
        return jnp.take(x, rows, axis=0) @ self.embed[...].T, PagedAttentionCache(tuple(views))

    def project(self, index, x):
        """q, k and v of a layer, by heads."""
        weights = (self.q[index], self.k[index], self.v[index])
        heads = (Q_HEADS, LAYERS[index].kv.num_kv_heads, LAYERS[index].kv.num_kv_heads)
        return [(x @ jnp.asarray(w[...])).reshape(len(x), n, -1) for w, n in zip(weights, heads, strict=True)]


def dense_logits(model, tokens):
    """The logits after each token of one sequence, in float64 numpy: no pages, no jax, no code of this package."""
    w = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.state(model)))
    n, kept = len(tokens), {}
    x, back = w["embed"][list(tokens)], np.subtract.outer(np.arange(n), np.arange(n))
    for index, layer in enumerate(LAYERS):
        at = x + w["place"][:n]
        q = (at @ w["q"][index]).reshape(n, Q_HEADS, -1)
        if layer.reads is None:
            k = (at @ w["k"][index]).reshape(n, layer.kv.num_kv_heads, -1)
            v = k[..., :16] if layer.kv.latent else (at @ w["v"][index]).reshape(n, layer.kv.num_kv_heads, -1)
            kept = (kept if index else {}) | {index: (k, v)}
        k, v = (
            np.repeat(y, Q_HEADS // y.shape[1], axis=1) for y in kept[index if layer.reads is None else layer.reads]
        )
        spec = layer.spec
        s = np.einsum("thd,phd->htp", q, k) * (spec.softmax_scale or layer.kv.head_dim**-0.5)
        if spec.soft_cap is not None:
            s = spec.soft_cap * np.tanh(s / spec.soft_cap)
        s = np.where((back >= 0) & (back < (spec.sliding_window or n)), s, -np.inf)
        sinks = w["sinks"][:, None, None] if layer.sinks else -np.inf
        top = np.maximum(s.max(-1, keepdims=True), sinks)
        weights = np.exp(s - top) / (np.exp(s - top).sum(-1, keepdims=True) + np.exp(sinks - top))
        x = x + np.einsum("htp,phd->thd", weights, v).reshape(n, -1) @ w["o"][index]
    return x @ w["embed"].T


def dense_answer(model, prompt, max_new_tokens):
    """The greedy answer, each token from all tokens before it, computed anew."""
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        tokens.append(int(dense_logits(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]
