"""The Llama family of decoders on a paged cache."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from paged_attn_layer._src.blocks.attention import AttentionConfig, PagedAttention
from paged_attn_layer._src.easydel.registry import AttentionMetadata
from paged_attn_layer._src.models.config import ModelConfig
from paged_cache import PagedAttentionCache, PagedAttentionCacheView
from paged_kernels import RaggedBatch


class GatedMLP(nnx.Module):
    """`down(silu(gate(x)) * up(x))`, the three projections `nnx.Linear`."""

    def __init__(self, config: ModelConfig, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> None:
        linear = functools.partial(nnx.Linear, use_bias=config.mlp_bias, param_dtype=param_dtype, rngs=rngs)
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: Float[Array, "*rows hidden"]) -> Float[Array, "*rows hidden"]:
        """The block's output for each row."""
        return self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    """One layer: `x + a`, then `x + a + m`, as `ModelConfig` writes it."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        *,
        metadata: AttentionMetadata | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        norm = functools.partial(
            nnx.RMSNorm, config.hidden_size, epsilon=config.rms_norm_eps, param_dtype=param_dtype, rngs=rngs
        )
        self.attention_norm = norm()
        self.attention = PagedAttention(
            attention_config(config, layer), metadata=metadata, param_dtype=param_dtype, rngs=rngs
        )
        self.mlp_norm = norm()
        self.mlp = GatedMLP(config, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self,
        hidden: Float[Array, "*replicas tokens hidden"],
        positions: Int32[Array, "*replicas tokens"],
        view: PagedAttentionCacheView,
        batch: RaggedBatch,
    ) -> tuple[Float[Array, "*replicas tokens hidden"], PagedAttentionCacheView]:
        """The hidden rows after this layer, and the view with their keys and values."""
        attended, view = self.attention(self.attention_norm(hidden), positions, view, batch)
        hidden = hidden + attended
        return hidden + self.mlp(self.mlp_norm(hidden)), view


class Decoder(nnx.Module):
    """A decoder that turns a step's tokens into the logits of the rows asked for.

        x = embed[token_ids];  x, view_l = layer_l(x, view_l) for each layer l;  logits = norm(x[rows]) head^T

    `head` is `lm_head [vocab, hidden]`, or the embedding where the config ties them. `paged_attn_layer.load_model`
    makes one with a checkpoint's weights; the constructor makes random ones.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        metadata: AttentionMetadata | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """A model with random weights.

        Args:
            config: sizes and switches.
            metadata: where and by what attention is computed (mesh, platform, backend); `None` leaves it to the cache.
            param_dtype: type of the weights, which the model also computes in.
            rngs: source of the weights.
        """
        self.config = config
        self.embed = nnx.Embed(config.vocab_size, config.hidden_size, param_dtype=param_dtype, rngs=rngs)
        self.layers = nnx.List(
            DecoderLayer(config, layer, metadata=metadata, param_dtype=param_dtype, rngs=rngs)
            for layer in range(config.num_hidden_layers)
        )
        self.norm = nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, param_dtype=param_dtype, rngs=rngs)
        if not config.tie_word_embeddings:
            shape = (config.vocab_size, config.hidden_size)
            self.lm_head = nnx.Param(nnx.initializers.lecun_normal(in_axis=1, out_axis=0)(rngs(), shape, param_dtype))

    def __call__(
        self,
        token_ids: Int32[Array, "*replicas tokens"],
        positions: Int32[Array, "*replicas tokens"],
        cache: PagedAttentionCache,
        batch: RaggedBatch,
        rows: Int32[Array, "*replicas n"],
    ) -> tuple[Float[Array, "*replicas n vocab"], PagedAttentionCache]:
        """Logits (float32) of the token after each of `rows`, and the cache that holds this step's keys and values.

        Args:
            token_ids: this step's tokens, those of each sequence together, as the batch says; padding may hold any.
                With a cache split over a data axis, every argument has a leading axis of its groups.
            positions: of each token in its sequence.
            cache: all layers' pages; donate it to `jax.jit` and it is updated in place.
            batch: which tokens belong to which sequence.
            rows: which tokens' logits to compute; the rest never get any.

        Raises:
            ValueError: the cache has another number of layers, or an argument does not fit.
        """
        if len(cache.views) != len(self.layers):
            raise ValueError(
                f"cache has {len(cache.views)} views; the model needs one for each of {len(self.layers)} layers"
            )
        hidden = self.embed(token_ids)
        views = []
        for layer, view in zip(self.layers, cache.views, strict=True):
            hidden, view = _run_layer(*nnx.split(layer), hidden, positions, view, batch)  # noqa: PLW2901
            views.append(view)
        return self._logits(jnp.take_along_axis(hidden, rows[..., None], axis=-2)), PagedAttentionCache(tuple(views))

    def _logits(self, hidden: Float[Array, "*rows hidden"]) -> Float[Array, "*rows vocab"]:
        head = self.embed.embedding if self.config.tie_word_embeddings else self.lm_head
        return jnp.einsum("...h,vh->...v", self.norm(hidden), head[...], preferred_element_type=jnp.float32)


def attention_config(config: ModelConfig, layer: int) -> AttentionConfig:
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


@functools.partial(jax.jit, static_argnums=0)
def _run_layer(graph: nnx.GraphDef, weights: Any, *inputs: Any) -> tuple[Array, PagedAttentionCacheView]:
    """A `DecoderLayer` given as its parts. Layers of one kind have equal graphs, so jax traces and lowers them once."""
    return nnx.merge(graph, weights)(*inputs)
