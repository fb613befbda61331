"""What decides the arrays and the result of a decoder: a description of each layer, and of what is around them."""

import dataclasses
import functools

from paged_attn_layer._src.blocks.attention import AttentionConfig
from paged_attn_layer._src.blocks.latent_attention import LatentAttentionConfig
from paged_attn_layer._src.blocks.mlp import MLPConfig
from paged_attn_layer._src.blocks.moe import MoEConfig
from paged_attn_layer._src.blocks.norm import NormConfig
from paged_attn_layer._src.blocks.per_layer_input import PerLayerInputConfig
from paged_cache import CacheSpec, LayerGroup


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """One layer of a decoder. Static and hashable; equal layers are traced and compiled once.

    With `r = residual_multiplier`, the layer maps hidden rows `x [tokens, hidden_size]` to

        x = x + r post(attention(pre(x)))        x = x + r post(mlp(pre(x)))

    where each `pre` and each `post` is a norm of its own. A parallel layer has one `pre`:

        x + r post(attention(pre(x))) + r post(mlp(pre(x)))

    Raises:
        ValueError: attention and MLP are for hidden rows of different sizes.
    """

    attention: AttentionConfig | LatentAttentionConfig
    mlp: MLPConfig | MoEConfig
    pre_norm: NormConfig | None
    """What `pre` computes; `None` leaves the rows as they are. Experts with norms of their own get none of this."""
    post_norm: NormConfig | None = None
    """What `post` computes; `None` leaves the rows as they are."""
    parallel: bool = False
    """True if attention and MLP get the same rows."""
    residual_multiplier: float = 1.0
    """The factor `r` on what attention and MLP add."""
    per_layer_input: PerLayerInputConfig | None = None
    """How inputs of the layer's own change the rows after the MLP (`PerLayerInput`); `None` if it has none."""
    has_scalar: bool = False
    """True if the rows after the layer are multiplied by a weight, one number."""

    def __post_init__(self) -> None:
        if self.attention.hidden_size != self.mlp.hidden_size:
            raise ValueError(
                f"attention.hidden_size={self.attention.hidden_size} must be mlp.hidden_size={self.mlp.hidden_size}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes and switches of a `Decoder`. Static and hashable.

        x = embed_scale embed[token_ids] + position_embed[positions]        x = layer(x) for each of layers
        logits = cap(logit_scale final_norm(x) head^T)                      cap(y) = c tanh(y / c), c = logit_soft_cap

    Raises:
        ValueError: a size is below 1, there is no layer, a layer is for another hidden size, layers differ in
            `per_layer_input`, or `shared_layers` are not the layers that store no keys and values.
    """

    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    """The longest sequence that the model is made for, in tokens."""
    layers: tuple[LayerConfig, ...]
    final_norm: NormConfig
    tie_word_embeddings: bool
    """True if the head that gives logits is the embedding."""
    shared_layers: tuple[tuple[int, int], ...] = ()
    """Layers that store no keys and values, each with the layer before it whose keys and values it reads."""
    per_layer_vocab_size: int | None = None
    """Number of token ids that have per-layer inputs; `None` means `vocab_size`."""
    embed_scale: float = 1.0
    """Factor on the embedding of a token."""
    learned_positions: bool = False
    """True if each of `max_position_embeddings` positions has an embedding, added to the token's."""
    logit_scale: float = 1.0
    """Factor on the logits."""
    logit_soft_cap: float | None = None
    """Bound on the logits' magnitude; `None` means no bound."""
    end_token_ids: frozenset[int] = frozenset()
    """Tokens that end an answer. One that is outside the vocabulary never comes."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "max_position_embeddings"):
            size = getattr(self, name)
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}={size!r} must be a whole number of at least 1")
        if not self.layers:
            raise ValueError("layers is empty; a decoder must have at least one layer")
        for index, layer in enumerate(self.layers):
            size = layer.attention.hidden_size
            if size != self.hidden_size:
                raise ValueError(f"layers[{index}].attention.hidden_size={size} must be hidden_size={self.hidden_size}")
        if len({layer.per_layer_input for layer in self.layers}) > 1:
            raise ValueError("layers differ in per_layer_input; it must be the same for all")
        self._check_shared_layers()

    def _check_shared_layers(self) -> None:
        without = {index for index, layer in enumerate(self.layers) if not layer.attention.stores_kv}
        if without != {layer for layer, _ in self.shared_layers}:
            raise ValueError(
                f"shared_layers={self.shared_layers} must name the layers with stores_kv=False: {sorted(without)}"
            )

    @property
    def per_layer_input(self) -> PerLayerInputConfig | None:
        """How layers use inputs of their own; `None` if they have none."""
        return self.layers[0].per_layer_input

    @property
    def cache_spec(self) -> CacheSpec:
        """What cache the layers need: one group for all that see the same keys and store the same."""
        return _cache_spec(self)


@functools.cache
def _cache_spec(config: DecoderConfig) -> CacheSpec:
    layers = ((_sight(layer.attention.sliding_window), layer.attention.kv) for layer in config.layers)
    return CacheSpec.of_layers(layers, config.shared_layers)


def _sight(window: int | None) -> LayerGroup:
    return LayerGroup.full() if window is None else LayerGroup.window(window)
