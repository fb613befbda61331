"""A decoder on a paged cache: one model for all families whose layers are attention and an MLP."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from paged_attn_layer._src.blocks.attention import AttentionConfig, PagedAttention
from paged_attn_layer._src.blocks.embedding import embedding_rows
from paged_attn_layer._src.blocks.latent_attention import LatentAttention, LatentAttentionConfig
from paged_attn_layer._src.blocks.mlp import MLP, MLPConfig
from paged_attn_layer._src.blocks.moe import MoE, MoEConfig
from paged_attn_layer._src.blocks.norm import Norm, NormConfig, normed
from paged_attn_layer._src.blocks.per_layer_input import PerLayerInput, PerLayerInputs
from paged_attn_layer._src.models.decoder_config import DecoderConfig, LayerConfig
from paged_cache import CacheSpec, PagedAttentionCache, PagedAttentionCacheView
from paged_kernels import Backend, PreparedBatch, RaggedBatch


class DecoderLayer(nnx.Module):
    """One layer, as `LayerConfig` writes it: `attention`, `mlp`, and the norms before and after each of them."""

    def __init__(
        self,
        config: LayerConfig,
        *,
        backend: str | Backend | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config

        def norm(norm_config: NormConfig | None) -> Norm | None:
            size = config.attention.hidden_size
            return None if norm_config is None else Norm(size, norm_config, param_dtype=param_dtype)

        self.attention_norm = norm(config.pre_norm)
        self.attention = _attention(config.attention, backend=backend, param_dtype=param_dtype, rngs=rngs)
        self.attention_post_norm = norm(config.post_norm)
        normalises = isinstance(config.mlp, MoEConfig) and config.mlp.norm is not None
        self.mlp_norm = None if config.parallel or normalises else norm(config.pre_norm)
        self.mlp = _mlp(config.mlp, param_dtype=param_dtype, rngs=rngs)
        self.mlp_post_norm = norm(config.post_norm)
        if config.per_layer_input is not None:
            self.per_layer_input = PerLayerInput(config.per_layer_input, param_dtype=param_dtype, rngs=rngs)
        if config.has_scalar:
            self.scalar = nnx.Param(jnp.ones(1, param_dtype))

    def __call__(
        self,
        hidden: Float[Array, "*replicas tokens hidden"],
        positions: Int32[Array, "*replicas tokens"],
        view: PagedAttentionCacheView,
        batch: RaggedBatch | PreparedBatch,
        inputs: Float[Array, "*replicas tokens size"] | None = None,
    ) -> tuple[Float[Array, "*replicas tokens hidden"], PagedAttentionCacheView]:
        """The hidden rows after this layer, and the view with their keys and values.

        Args:
            hidden: the rows before it.
            positions: of each token in its sequence.
            view: the layer's pages.
            batch: which rows belong to which sequence.
            inputs: the layer's own input for each token, if its config has `per_layer_input`.
        """
        before = normed(hidden, self.attention_norm)
        attended, view = self.attention(before, positions, view, batch)
        after = self._add(hidden, normed(attended, self.attention_post_norm))
        if not self.config.parallel:
            before = normed(after, self.mlp_norm)
        after = self._add(after, normed(self._feed_forward(before, view), self.mlp_post_norm))
        if inputs is not None:
            after = self.per_layer_input(after, inputs)
        return after * self.scalar[...].reshape((1,) * after.ndim) if self.config.has_scalar else after, view

    def _feed_forward(self, rows: Array, view: PagedAttentionCacheView) -> Array:
        return self.mlp(rows, view) if isinstance(self.mlp, MoE) else self.mlp(rows)

    def _add(self, hidden: Array, change: Array) -> Array:
        return hidden + self.config.residual_multiplier * change


class Decoder(nnx.Module):
    """A decoder, a `CausalLM`: from the tokens of a step to logits of the rows asked for.

        x = embed[token_ids];  x, view_l = layer_l(x, view_l) for each layer l;  logits = norm(x[rows]) head^T

    `head` is `lm_head [vocab, hidden]`, or the embedding where the config ties them; `DecoderConfig` writes the rest.
    `paged_attn_layer.load_model` makes one with a checkpoint's weights; the constructor makes random ones.
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
        if config.learned_positions:
            rows = config.max_position_embeddings
            self.position_embed = nnx.Embed(rows, config.hidden_size, param_dtype=param_dtype, rngs=rngs)
        inputs = config.per_layer_input
        if inputs is not None:
            vocab_size = config.per_layer_vocab_size or config.vocab_size
            self.per_layer_inputs = PerLayerInputs(
                inputs, len(config.layers), vocab_size, param_dtype=param_dtype, rngs=rngs
            )
        self.layers = nnx.List(
            DecoderLayer(layer, backend=backend, param_dtype=param_dtype, rngs=rngs) for layer in config.layers
        )
        self.norm = Norm(config.hidden_size, config.final_norm, param_dtype=param_dtype)
        if not config.tie_word_embeddings:
            shape = (config.vocab_size, config.hidden_size)
            self.lm_head = nnx.Param(nnx.initializers.lecun_normal(in_axis=1, out_axis=0)(rngs(), shape, param_dtype))

    @property
    def cache_spec(self) -> CacheSpec:
        """What cache the layers need: one group for all that see the same keys and store the same."""
        return self.config.cache_spec

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.config.vocab_size

    @property
    def max_positions(self) -> int:
        """Tokens of the longest sequence that the model is made for."""
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
        spec = self.cache_spec
        _check_cache(spec, cache, batches)
        hidden, views = self._embedded(token_ids, positions), list(cache.views)
        inputs = self._inputs_of_layers(token_ids, hidden)
        prepared: dict[tuple[int, AttentionConfig | LatentAttentionConfig], PreparedBatch] = {}
        for layer, place, own in zip(self.layers, spec.places(), inputs, strict=True):
            kind = (place.group, layer.attention.config)
            if kind not in prepared:
                prepared[kind] = layer.attention.prepare(batches[place.group], views[place.view], hidden)
            parts = nnx.split(layer)
            view, batch = views[place.view], prepared[kind]
            hidden, views[place.view] = _run_layer(*parts, hidden, positions, view, batch, own)
        return self._logits(jnp.take_along_axis(hidden, rows[..., None], axis=-2)), PagedAttentionCache(tuple(views))

    def _embedded(self, token_ids: Array, positions: Array) -> Array:
        hidden = embedding_rows(self.embed, token_ids) * self.config.embed_scale
        return hidden + embedding_rows(self.position_embed, positions) if self.config.learned_positions else hidden

    def _inputs_of_layers(self, token_ids: Array, embedded: Array) -> Sequence[Array | None]:
        """The input that each layer gets beside the hidden rows, or `None`."""
        layers = len(self.config.layers)
        if self.config.per_layer_input is None:
            return [None] * layers
        inputs = self.per_layer_inputs(token_ids, embedded)
        return [inputs[..., layer, :] for layer in range(layers)]

    def _logits(self, hidden: Float[Array, "*rows hidden"]) -> Float[Array, "*rows vocab"]:
        config = self.config
        head = self.embed.embedding if config.tie_word_embeddings else self.lm_head
        logits = jnp.einsum("...h,vh->...v", self.norm(hidden), head[...], preferred_element_type=jnp.float32)
        logits = logits * config.logit_scale
        cap = config.logit_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)


def _attention(
    config: AttentionConfig | LatentAttentionConfig,
    *,
    backend: str | Backend | None,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> PagedAttention | LatentAttention:
    if isinstance(config, LatentAttentionConfig):
        return LatentAttention(config, backend=backend, param_dtype=param_dtype, rngs=rngs)
    return PagedAttention(config, backend=backend, param_dtype=param_dtype, rngs=rngs)


def _mlp(config: MLPConfig | MoEConfig, *, param_dtype: DTypeLike, rngs: nnx.Rngs) -> MLP | MoE:
    if isinstance(config, MoEConfig):
        return MoE(config, param_dtype=param_dtype, rngs=rngs)
    return MLP(config, param_dtype=param_dtype, rngs=rngs)


def _check_cache(spec: CacheSpec, cache: PagedAttentionCache, batches: tuple[RaggedBatch, ...]) -> None:
    views, groups = len(spec.views()), len(spec.pool_groups())
    if len(cache.views) != views:
        raise ValueError(f"cache has {len(cache.views)} views; the model needs {views} (cache_spec.views())")
    if len(batches) != groups:
        raise ValueError(f"batches has {len(batches)} entries; the model needs {groups} (cache_spec.pool_groups())")


@functools.partial(jax.jit, static_argnums=0)
def _run_layer(graph: nnx.GraphDef, weights: Any, *inputs: Any) -> tuple[Array, PagedAttentionCacheView]:
    """A `DecoderLayer` given as its parts. Layers of one kind have equal graphs, so jax traces and lowers them once."""
    return nnx.merge(graph, weights)(*inputs)
