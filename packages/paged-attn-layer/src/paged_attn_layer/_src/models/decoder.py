"""A decoder of pre-norm layers on a paged cache: the model of the Llama family."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from paged_attn_layer._src.blocks.attention import AttentionConfig, PagedAttention
from paged_attn_layer._src.blocks.mlp import GatedMLP
from paged_attn_layer._src.models.decoder_config import DecoderConfig
from paged_cache import CacheSpec, LayerGroup, PagedAttentionCache, PagedAttentionCacheView
from paged_kernels import Backend, PreparedBatch, RaggedBatch


class DecoderLayer(nnx.Module):
    """One layer: `x + a`, then `x + a + m`, as `DecoderConfig` writes it."""

    def __init__(
        self,
        config: DecoderConfig,
        layer: int,
        *,
        backend: str | Backend | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        norm = functools.partial(
            nnx.RMSNorm, config.hidden_size, epsilon=config.rms_norm_eps, param_dtype=param_dtype, rngs=rngs
        )
        self.attention_norm = norm()
        self.attention = PagedAttention(
            attention_config(config, layer), backend=backend, param_dtype=param_dtype, rngs=rngs
        )
        self.mlp_norm = norm()
        self.mlp = GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            use_bias=config.mlp_bias,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(
        self,
        hidden: Float[Array, "*replicas tokens hidden"],
        positions: Int32[Array, "*replicas tokens"],
        view: PagedAttentionCacheView,
        batch: RaggedBatch | PreparedBatch,
    ) -> tuple[Float[Array, "*replicas tokens hidden"], PagedAttentionCacheView]:
        """The hidden rows after this layer, and the view with their keys and values."""
        attended, view = self.attention(self.attention_norm(hidden), positions, view, batch)
        hidden = hidden + attended
        return hidden + self.mlp(self.mlp_norm(hidden)), view


class Decoder(nnx.Module):
    """A decoder of pre-norm layers, a `CausalLM`: from the tokens of a step to logits of the rows asked for.

        x = embed[token_ids];  x, view_l = layer_l(x, view_l) for each layer l;  logits = norm(x[rows]) head^T

    `head` is `lm_head [vocab, hidden]`, or the embedding where the config ties them. `paged_attn_layer.load_model`
    makes one with a checkpoint's weights; the constructor makes random ones.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        backend: str | Backend | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """A model with random weights.

        Args:
            config: sizes and switches.
            backend: the kernels' backend, by name; `None` takes the first that can.
            param_dtype: type of the weights, which the model also computes in.
            rngs: source of the weights.
        """
        self.config = config
        self.embed = nnx.Embed(config.vocab_size, config.hidden_size, param_dtype=param_dtype, rngs=rngs)
        self.layers = nnx.List(
            DecoderLayer(config, layer, backend=backend, param_dtype=param_dtype, rngs=rngs)
            for layer in range(config.num_hidden_layers)
        )
        self.norm = nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, param_dtype=param_dtype, rngs=rngs)
        if not config.tie_word_embeddings:
            shape = (config.vocab_size, config.hidden_size)
            self.lm_head = nnx.Param(nnx.initializers.lecun_normal(in_axis=1, out_axis=0)(rngs(), shape, param_dtype))

    @property
    def cache_spec(self) -> CacheSpec:
        """What cache the layers need: one group for all that see the same keys."""
        return _cache_spec(self.config)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.config.vocab_size

    @property
    def max_positions(self) -> int:
        """Tokens of the longest sequence that the model was trained for."""
        return self.config.max_position_embeddings

    @property
    def end_token_ids(self) -> frozenset[int]:
        """Tokens that end an answer, as the checkpoint says."""
        return self.config.end_token_ids

    @property
    def dtype(self) -> DTypeLike:
        """The type of the weights, and so of keys and values."""
        return self.embed.embedding[...].dtype

    def __call__(
        self,
        token_ids: Int32[Array, "*replicas tokens"],
        positions: Int32[Array, "*replicas tokens"],
        cache: PagedAttentionCache,
        batches: tuple[RaggedBatch, ...],
        rows: Int32[Array, "*replicas n"],
    ) -> tuple[Float[Array, "*replicas n vocab"], PagedAttentionCache]:
        """Logits (float32) of the token after each of `rows`, and the cache that holds this step's keys and values.

        Args:
            token_ids: this step's tokens, those of each sequence together, as the batches say; padding may hold any.
                With a cache split over a data axis, every argument has a leading axis of its replicas.
            positions: of each token in its sequence.
            cache: the pages of all layers; donate it to `jax.jit` and it is updated in place.
            batches: which tokens belong to which sequence, for each group of layers (`cache_spec.pool_groups()`).
            rows: which tokens' logits to compute; the rest never get any.

        Raises:
            ValueError: the cache or the batches are not as `cache_spec` says, or an argument does not fit.
        """
        places = self.cache_spec.places()
        self._check_cache(cache, batches)
        hidden, views = self.embed(token_ids), list(cache.views)
        prepared: dict[tuple[int, AttentionConfig], PreparedBatch] = {}
        for layer, place in zip(self.layers, places, strict=True):
            kind = (place.group, layer.attention.config)
            if kind not in prepared:
                prepared[kind] = layer.attention.prepare(batches[place.group], views[place.view], hidden)
            parts = nnx.split(layer)
            hidden, views[place.view] = _run_layer(*parts, hidden, positions, views[place.view], prepared[kind])
        return self._logits(jnp.take_along_axis(hidden, rows[..., None], axis=-2)), PagedAttentionCache(tuple(views))

    def _logits(self, hidden: Float[Array, "*rows hidden"]) -> Float[Array, "*rows vocab"]:
        head = self.embed.embedding if self.config.tie_word_embeddings else self.lm_head
        return jnp.einsum("...h,vh->...v", self.norm(hidden), head[...], preferred_element_type=jnp.float32)

    def _check_cache(self, cache: PagedAttentionCache, batches: tuple[RaggedBatch, ...]) -> None:
        views, groups = len(self.cache_spec.views()), len(self.cache_spec.pool_groups())
        if len(cache.views) != views:
            raise ValueError(f"cache has {len(cache.views)} views; the model needs {views} (cache_spec.views())")
        if len(batches) != groups:
            raise ValueError(f"batches has {len(batches)} entries; the model needs {groups} (cache_spec.pool_groups())")


def attention_config(config: DecoderConfig, layer: int) -> AttentionConfig:
    """What one layer's attention computes."""
    return AttentionConfig(
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rope=config.rope,
        qkv_bias=config.qkv_bias,
        out_bias=config.o_bias,
        sliding_window=config.sliding_window(layer),
    )


@functools.cache
def _cache_spec(config: DecoderConfig) -> CacheSpec:
    layers = [attention_config(config, layer) for layer in range(config.num_hidden_layers)]
    return CacheSpec.of_layers(
        [
            (LayerGroup.window(each.sliding_window) if each.sliding_window else LayerGroup.full(), each.kv)
            for each in layers
        ]
    )


@functools.partial(jax.jit, static_argnums=0)
def _run_layer(graph: nnx.GraphDef, weights: Any, *inputs: Any) -> tuple[Array, PagedAttentionCacheView]:
    """A `DecoderLayer` given as its parts. Layers of one kind have equal graphs, so jax traces and lowers them once."""
    return nnx.merge(graph, weights)(*inputs)
