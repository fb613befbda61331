"""Attention as a layer of a model: projections, rotary embedding, the cache, and the way back."""

import dataclasses
import functools
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from paged_attn_layer._src.attention.attend import attend, prepare
from paged_attn_layer._src.attention.mesh import on_mesh
from paged_attn_layer._src.blocks.norm import Norm, NormConfig
from paged_attn_layer._src.blocks.rope import RopeConfig, apply_rope
from paged_cache import KVShape, PagedAttentionCacheView
from paged_kernels import AttentionSpec, Backend, HeadParams, PreparedBatch, RaggedBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryGrowth:
    """A factor on queries that grows with their position `t` (Llama 4, Ministral 3): `1 + beta log(1 + t // tokens)`.

    Raises:
        ValueError: `tokens` is below 1.
    """

    beta: float
    tokens: int
    """Positions up to which the factor is 1."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens={self.tokens} must be at least 1")

    def factor(self, positions: Int32[Array, "*rows"]) -> Float[Array, "*rows"]:
        """The factor at each position, in float32."""
        return 1 + self.beta * jnp.log1p((positions // self.tokens).astype(jnp.float32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Sizes of one attention layer, and what is computed in it. Static and hashable.

    Raises:
        ValueError: a size is below 1, the KV heads do not divide the heads, there is not one slope for each head, or
            the rotary embedding does not fit the heads.
    """

    hidden_size: int
    """Size of a token's hidden state."""
    num_heads: int
    """Number of query heads."""
    num_kv_heads: int
    """Number of KV heads; each serves `num_heads / num_kv_heads` query heads."""
    head_dim: int
    """Size of one head."""
    rope: RopeConfig | None = dataclasses.field(default_factory=RopeConfig)
    """Rotary embedding of queries and keys; `None` leaves them as they are."""
    qkv_bias: bool = False
    """True if the projections to queries, keys and values add a bias."""
    out_bias: bool = False
    """True if the projection back to the hidden size adds a bias."""
    qk_norm: NormConfig | None = None
    """How queries and keys are normalised before rotary embedding; `None` leaves them as they are."""
    qk_norm_over: Literal["head", "each_head", "projection"] = "head"
    """`head` if each head is normalised by itself, `each_head` if each also has weights of its own, `projection` if all
    heads are normalised together."""
    v_norm: NormConfig | None = None
    """How each head of the values is normalised; `None` leaves them as they are."""
    values_are_keys: bool = False
    """True if the values are the projected keys, before norm and rotary embedding: no projection of their own."""
    stores_kv: bool = True
    """False if the layer reads the keys and values of an earlier layer: no projections to either."""
    softmax_scale: float | None = None
    """Factor on `q . k`; `None` means `head_dim ** -0.5`."""
    query_growth: QueryGrowth | None = None
    """A factor on queries that grows with their position; `None` means none."""
    soft_cap: float | None = None
    """Bound on the logits' magnitude; `None` means no bound."""
    sliding_window: int | None = None
    """How many keys a query sees, itself included; `None` means all."""
    sinks: bool = False
    """True if each head has an attention sink, a weight of the layer (gpt-oss)."""
    alibi_slopes: tuple[float, ...] | None = None
    """What a logit of each head loses for every position between query and key (ALiBi); `None` means nothing."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_heads", "num_kv_heads", "head_dim"):
            size = getattr(self, name)
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if self.rope is not None:
            self.rope.check_head(self.head_dim)
        if self.qk_norm_over not in ("head", "each_head", "projection"):
            raise ValueError(f"qk_norm_over={self.qk_norm_over!r} must be 'head', 'each_head' or 'projection'")
        slopes = self.alibi_slopes
        if slopes is not None and len(slopes) != self.num_heads:
            raise ValueError(f"alibi_slopes has {len(slopes)} entries; it must have num_heads={self.num_heads}")

    @property
    def spec(self) -> AttentionSpec:
        """What the kernels compute."""
        return AttentionSpec(
            softmax_scale=self.softmax_scale, soft_cap=self.soft_cap, sliding_window=self.sliding_window
        )

    @property
    def kv(self) -> KVShape:
        """What the layer stores for one token, or what the layer stores whose keys and values it reads."""
        return KVShape(num_kv_heads=self.num_kv_heads, head_dim=self.head_dim)


class PagedAttention(nnx.Module):
    """Self-attention of a step's tokens, with their keys and values kept in pages.

        q, k, v = x Wq, x Wk, x Wv        q, k turned by their positions        out = attend(q, pages with k, v) Wo

    `q_proj`, `k_proj`, `v_proj` and `o_proj` are `nnx.Linear`, each with a `kernel [in, out]`: a Hugging Face weight
    transposed. Heads are contiguous in `out` (in `in` for `o_proj`), so kernels split over a mesh as the heads do.
    `sinks [num_heads]` and the norms `q_norm`, `k_norm` and `v_norm` are there where the config asks for them.
    """

    def __init__(
        self,
        config: AttentionConfig,
        *,
        backend: str | Backend | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """A layer with random weights.

        Args:
            config: sizes, and what is computed.
            backend: the kernels' backend, by name; `None` takes the first that can. The cache view says where: on its
                mesh, or on the context's.
            dtype: type that the projections compute in; `None` takes the wider of the input's and the weights'.
            param_dtype: type of the weights.
            rngs: source of the weights.
        """
        self.config = config
        self.backend = backend
        linear = functools.partial(nnx.Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = linear(config.hidden_size, q_size, use_bias=config.qkv_bias)
        if config.stores_kv:
            self.k_proj = linear(config.hidden_size, kv_size, use_bias=config.qkv_bias)
            if not config.values_are_keys:
                self.v_proj = linear(config.hidden_size, kv_size, use_bias=config.qkv_bias)
        self.o_proj = linear(q_size, config.hidden_size, use_bias=config.out_bias)
        self._add_norms(param_dtype)
        if config.sinks:
            self.sinks = nnx.Param(jnp.zeros(config.num_heads, param_dtype))

    def _add_norms(self, param_dtype: DTypeLike) -> None:
        config = self.config

        def norm(heads: int, norm_config: NormConfig | None, over: str = "head") -> Norm | None:
            size = config.head_dim
            sizes = {"head": size, "each_head": (heads, size), "projection": heads * size}
            return Norm(sizes[over], norm_config, param_dtype=param_dtype) if norm_config and heads else None

        kv_heads = config.num_kv_heads if config.stores_kv else 0
        self.q_norm = norm(config.num_heads, config.qk_norm, config.qk_norm_over)
        self.k_norm = norm(kv_heads, config.qk_norm, config.qk_norm_over)
        self.v_norm = norm(kv_heads, config.v_norm)

    def __call__(
        self,
        hidden: Float[Array, "*replicas tokens hidden"],
        positions: Int32[Array, "*replicas tokens"],
        cache_view: PagedAttentionCacheView,
        batch: RaggedBatch | PreparedBatch,
    ) -> tuple[Float[Array, "*replicas tokens hidden"], PagedAttentionCacheView]:
        """The output of each token, and the view that holds its key and value; padding rows give no useful output.

        Args:
            hidden: this step's tokens; with a leading `replicas` axis where the cache is split over a data axis.
            positions: of each token in its sequence; what padding has does not matter.
            cache_view: this layer's pages.
            batch: which rows belong to which sequence; `prepare` it to share its work between layers of one config.

        Raises:
            ValueError: an argument does not fit the others.
        """
        q = self._queries(hidden, positions)
        k, v = self._keys_and_values(hidden, positions) if self.config.stores_kv else (None, None)
        attended = attend(
            q,
            k,
            v,
            on_mesh(cache_view),
            batch,
            self.config.spec,
            head_params=self._head_params(),
            backend=self.backend,
        )
        out = self.o_proj(attended.out.reshape(*attended.out.shape[:-2], -1))
        return out, dataclasses.replace(cache_view, pages=attended.view.pages)

    def prepare(
        self,
        batch: RaggedBatch,
        cache_view: PagedAttentionCacheView,
        hidden: Float[Array, "*replicas tokens hidden"],
    ) -> PreparedBatch:
        """The batch with what the kernels derive from it, for every layer of this config over such pages.

        Args:
            batch: which rows belong to which sequence.
            cache_view: the pages of one such layer; only shapes are looked at.
            hidden: this step's tokens; only shape and dtype are looked at.
        """
        kernel = self.q_proj.kernel[...]
        return prepare(
            batch,
            on_mesh(cache_view),
            self.config.spec,
            tokens=hidden.shape[-2],
            q_heads=self.config.num_heads,
            q_dtype=self.q_proj.dtype or jnp.promote_types(hidden.dtype, kernel.dtype),
            head_params=self._head_params(),
            backend=self.backend,
        )

    def _queries(self, hidden: Array, positions: Array) -> Array:
        q = self._rotate(self._normed_heads(self.q_proj(hidden), self.q_norm), positions)
        growth = self.config.query_growth
        return q if growth is None else q * growth.factor(positions)[..., None, None].astype(q.dtype)

    def _keys_and_values(self, hidden: Array, positions: Array) -> tuple[Array, Array]:
        k = self.k_proj(hidden)
        v = self._split_heads(k if self.config.values_are_keys else self.v_proj(hidden))
        k = self._rotate(self._normed_heads(k, self.k_norm), positions)
        return k, v if self.v_norm is None else self.v_norm(v)

    def _normed_heads(self, x: Array, norm: Norm | None) -> Array:
        if norm is None:
            return self._split_heads(x)
        together = self.config.qk_norm_over == "projection"
        return self._split_heads(norm(x)) if together else norm(self._split_heads(x))

    def _split_heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], -1, self.config.head_dim)

    def _head_params(self) -> HeadParams:
        slopes = self.config.alibi_slopes
        return HeadParams(
            sinks=self.sinks[...] if self.config.sinks else None,
            alibi_slopes=None if slopes is None else jnp.array(slopes, jnp.float32),
        )

    def _rotate(self, x: Array, positions: Array) -> Array:
        return x if self.config.rope is None else apply_rope(x, positions, self.config.rope)
