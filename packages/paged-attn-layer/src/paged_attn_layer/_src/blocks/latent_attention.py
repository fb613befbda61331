"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): pages hold one latent vector for all heads."""

import dataclasses
import functools

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from paged_attn_layer._src.attention.attend import attend, prepare
from paged_attn_layer._src.attention.mesh import on_mesh
from paged_attn_layer._src.blocks.norm import Norm, NormConfig
from paged_attn_layer._src.blocks.rope import RopeConfig, apply_rope
from paged_cache import KVShape, PagedAttentionCacheView
from paged_kernels import AttentionSpec, Backend, PreparedBatch, RaggedBatch

_SIZES = ("hidden_size", "num_heads", "kv_rank", "nope_dim", "rope_dim", "v_head_dim")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentAttentionConfig:
    """Sizes of a layer of multi-head latent attention. Static and hashable.

    Hugging Face's names are in brackets.

    Raises:
        ValueError: a size is below 1, or the rotary embedding does not fit `rope_dim`.
    """

    hidden_size: int
    """Size of a token's hidden state."""
    num_heads: int
    """Number of query heads (`num_attention_heads`)."""
    q_rank: int | None
    """Size of the vector that queries are made of (`q_lora_rank`); `None` if they are made of the hidden state."""
    kv_rank: int
    """Size of the latent vector that keys and values are made of (`kv_lora_rank`)."""
    nope_dim: int
    """Elements of a head of queries and keys that do not turn (`qk_nope_head_dim`)."""
    rope_dim: int
    """Elements that turn (`qk_rope_head_dim`); all heads have the same in their keys."""
    v_head_dim: int
    """Elements of a head of values (`v_head_dim`)."""
    latent_norm: NormConfig
    """How the vectors are normalised that queries, keys and values are made of."""
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
    """Rotary embedding of the elements that turn."""
    use_bias: bool = False
    """True if `q_a_proj`, `kv_a_proj` and `o_proj` add a bias."""
    softmax_scale: float | None = None
    """Factor on `q . k`; `None` means `(nope_dim + rope_dim) ** -0.5`."""

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in _SIZES}
        if self.q_rank is not None:
            sizes["q_rank"] = self.q_rank
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        self.rope.check_head(self.rope_dim)

    @property
    def spec(self) -> AttentionSpec:
        """What the kernels compute."""
        scale = self.softmax_scale
        return AttentionSpec(softmax_scale=(self.nope_dim + self.rope_dim) ** -0.5 if scale is None else scale)

    @property
    def sliding_window(self) -> None:
        """Always `None`: a query sees all keys."""
        return None

    @property
    def stores_kv(self) -> bool:
        """Always true: each layer has latent vectors of its own."""
        return True

    @property
    def kv(self) -> KVShape:
        """What the layer stores for one token: the latent vector, then the elements of the key that turn."""
        width = self.kv_rank + self.rope_dim
        return KVShape(num_kv_heads=1, head_dim=width, v_head_dim=self.kv_rank, latent=True)


class LatentAttention(nnx.Module):
    """Self-attention of a step's tokens whose keys and values are kept as one latent vector per token.

        c, r = split(x W_kv_a),  c = norm(c),  r turned        one latent entry [c, r] in the pages
        q_nope, q_rot = split(q of each head),  q_rot turned   q = x W_q, or norm(x W_q_a) W_q_b

    Head `h` has the keys `[K_h c, r]` and the values `V_h c`. They are never made, because

        q_nope . (K_h c) = (q_nope K_h) . c        sum_t p_t V_h c_t = V_h sum_t p_t c_t

    so the queries `[q_nope K_h, q_rot]` attend over the pages, and `V_h` is applied to what comes out. The weights are
    `q_proj`, or `q_a_proj`, `q_a_norm` and `q_b_proj`; `kv_a_proj`, `kv_a_norm`; `k_up [heads, nope, rank]` (K),
    `v_up [heads, v, rank]` (V), and `o_proj`.
    """

    def __init__(
        self,
        config: LatentAttentionConfig,
        *,
        backend: str | Backend | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """A layer with random weights.

        Args:
            config: sizes.
            backend: the kernels' backend, by name; `None` takes the first that can.
            param_dtype: type of the weights.
            rngs: source of the weights.
        """
        self.config = config
        self.backend = backend
        linear = functools.partial(nnx.Linear, param_dtype=param_dtype, rngs=rngs)
        heads, hidden, rank = config.num_heads, config.hidden_size, config.kv_rank
        q_size = heads * (config.nope_dim + config.rope_dim)
        if config.q_rank is None:
            self.q_proj = linear(hidden, q_size, use_bias=False)
        else:
            self.q_a_proj = linear(hidden, config.q_rank, use_bias=config.use_bias)
            self.q_a_norm = Norm(config.q_rank, config.latent_norm, param_dtype=param_dtype)
            self.q_b_proj = linear(config.q_rank, q_size, use_bias=False)
        self.kv_a_proj = linear(hidden, rank + config.rope_dim, use_bias=config.use_bias)
        self.kv_a_norm = Norm(rank, config.latent_norm, param_dtype=param_dtype)
        init = nnx.initializers.lecun_normal(in_axis=2, out_axis=1, batch_axis=0)
        self.k_up = nnx.Param(init(rngs(), (heads, config.nope_dim, rank), param_dtype))
        self.v_up = nnx.Param(init(rngs(), (heads, config.v_head_dim, rank), param_dtype))
        self.o_proj = linear(heads * config.v_head_dim, hidden, use_bias=config.use_bias)

    def __call__(
        self,
        hidden: Float[Array, "*replicas tokens hidden"],
        positions: Int32[Array, "*replicas tokens"],
        cache_view: PagedAttentionCacheView,
        batch: RaggedBatch | PreparedBatch,
    ) -> tuple[Float[Array, "*replicas tokens hidden"], PagedAttentionCacheView]:
        """The output of each token, and the view that holds its latent entry; padding rows give no useful output.

        Args:
            hidden: this step's tokens; with a leading `replicas` axis where the cache is split over a data axis.
            positions: of each token in its sequence; what padding has does not matter.
            cache_view: this layer's pages, of latent entries.
            batch: which rows belong to which sequence; `prepare` it to share its work between layers of one config.

        Raises:
            ValueError: an argument does not fit the others.
        """
        q, entries = self._queries(hidden, positions), self._entries(hidden, positions)
        view = on_mesh(cache_view)
        attended = attend(q, entries, None, view, batch, self.config.spec, backend=self.backend)
        values = jnp.einsum("...hr,hvr->...hv", attended.out, self.v_up[...])
        out = self.o_proj(values.reshape(*values.shape[:-2], -1))
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
        return prepare(
            batch,
            on_mesh(cache_view),
            self.config.spec,
            tokens=hidden.shape[-2],
            q_heads=self.config.num_heads,
            q_dtype=jnp.promote_types(hidden.dtype, self.k_up[...].dtype),
            backend=self.backend,
        )

    def _queries(self, hidden: Array, positions: Array) -> Float[Array, "*rows heads rank+rope"]:
        """What attends over the latent entries."""
        config = self.config
        q = self.q_proj(hidden) if config.q_rank is None else self.q_b_proj(self.q_a_norm(self.q_a_proj(hidden)))
        q = q.reshape(*q.shape[:-1], config.num_heads, -1)
        q_nope, q_rot = q[..., : config.nope_dim], q[..., config.nope_dim :]
        absorbed = jnp.einsum("...hn,hnr->...hr", q_nope, self.k_up[...])
        return jnp.concatenate([absorbed, apply_rope(q_rot, positions, config.rope)], axis=-1)

    def _entries(self, hidden: Array, positions: Array) -> Float[Array, "*rows 1 rank+rope"]:
        """What the pages store of each token."""
        entry = self.kv_a_proj(hidden)[..., None, :]
        latent, k_rot = entry[..., : self.config.kv_rank], entry[..., self.config.kv_rank :]
        return jnp.concatenate([self.kv_a_norm(latent), apply_rope(k_rot, positions, self.config.rope)], axis=-1)
