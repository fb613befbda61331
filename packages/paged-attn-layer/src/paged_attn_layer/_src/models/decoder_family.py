"""What families of `Decoder`s have in common: the model, and how its weights are split over a mesh."""

import dataclasses
from collections.abc import Callable

from paged_attn_layer._src.blocks.moe import MoEConfig
from paged_attn_layer._src.convert.gguf_names import GGUFNames
from paged_attn_layer._src.convert.weights import WeightRule
from paged_attn_layer._src.models.decoder import Decoder
from paged_attn_layer._src.models.decoder_config import DecoderConfig, LayerConfig
from paged_attn_layer._src.models.family import Family
from paged_attn_layer._src.models.sharding import EXPERTS, expert_axes, head_axes
from paged_cache import HFConfig, PartitionManager

SHARDINGS = (
    ("embed.embedding", ("vocab", None)),
    ("position_embed.embedding", ("positions", None)),
    ("lm_head", ("vocab", None)),
    ("layers.{layer}.attention.{q|k|v}_proj.kernel", (None, "kv_heads")),
    ("layers.{layer}.attention.{q|k|v}_proj.bias", ("kv_heads",)),
    ("layers.{layer}.attention.{q_a|kv_a}_proj.kernel", (None, None)),  # what they make is for all heads
    ("layers.{layer}.attention.q_b_proj.kernel", (None, "kv_heads")),
    ("layers.{layer}.attention.{k|v}_up", ("kv_heads", None, None)),
    ("layers.{layer}.attention.o_proj.kernel", ("kv_heads", None)),
    ("layers.{layer}.attention.sinks", ("kv_heads",)),
    ("layers.{layer}.mlp.{gate|up}_proj.kernel", (None, "mlp")),
    ("layers.{layer}.mlp.{gate|up}_proj.bias", ("mlp",)),
    ("layers.{layer}.mlp.down_proj.kernel", ("mlp", None)),
    ("layers.{layer}.mlp.shared.{gate|up}_proj.kernel", (None, "shared_mlp")),
    ("layers.{layer}.mlp.shared.down_proj.kernel", ("shared_mlp", None)),
    ("layers.{layer}.mlp.router.kernel", (None, None)),  # small, and each device needs all of it
    ("layers.{layer}.mlp.experts.{gate|up}_proj", (EXPERTS, None, "mlp")),
    ("layers.{layer}.mlp.experts.{gate|up}_bias", (EXPERTS, "mlp")),
    ("layers.{layer}.mlp.experts.down_proj", (EXPERTS, "mlp", None)),
    ("layers.{layer}.mlp.experts.down_bias", (EXPERTS, None)),
    ("per_layer_inputs.embed.embedding", ("per_layer_vocab", None)),
    ("per_layer_inputs.proj.kernel", (None, None)),  # small, and each layer's part is needed by all devices
    ("layers.{layer}.per_layer_input.gate_proj.kernel", (None, "per_layer_input")),
    ("layers.{layer}.per_layer_input.out_proj.kernel", ("per_layer_input", None)),
)
"""The axes of a `Decoder`'s weights. Query heads are split with the KV heads that they share.

Latent attention has keys and values of each head, made of a vector that every device holds.
"""


def axis_sizes(config: DecoderConfig, path: str) -> dict[str, int]:
    """How many parts each axis of `SHARDINGS` may be cut into, for the weight at `path`."""
    first, *rest = path.split(".")
    if first != "layers":
        return {
            "vocab": config.vocab_size,
            "positions": config.max_position_embeddings,
            "per_layer_vocab": config.per_layer_vocab_size or config.vocab_size,
        }
    layer = config.layers[int(rest[0])]
    attention, inputs = layer.attention, layer.per_layer_input
    moe = layer.mlp if isinstance(layer.mlp, MoEConfig) else None
    shared = None if moe is None else moe.shared
    return {
        EXPERTS: 1 if moe is None else moe.router.num_experts,
        "kv_heads": attention.num_heads if attention.kv.latent else attention.kv.num_kv_heads,
        "mlp": layer.mlp.intermediate_size,
        "shared_mlp": 1 if shared is None else shared.intermediate_size,
        "per_layer_input": 1 if inputs is None else inputs.size,
    }


def with_mesh_axes(config: DecoderConfig, partition_manager: PartitionManager | None) -> DecoderConfig:
    """The config whose experts are split over the mesh axes that the partition manager names."""
    axes = {"expert_axes": expert_axes(partition_manager), "mlp_axes": head_axes(partition_manager)}

    def renamed(layer: LayerConfig) -> LayerConfig:
        moe = layer.mlp
        return dataclasses.replace(layer, mlp=dataclasses.replace(moe, **axes)) if isinstance(moe, MoEConfig) else layer

    return dataclasses.replace(config, layers=tuple(map(renamed, config.layers)))


def decoder_family(
    *,
    architectures: tuple[str, ...],
    model_types: tuple[str, ...],
    read_config: Callable[[HFConfig], DecoderConfig],
    weights: Callable[[DecoderConfig], tuple[WeightRule, ...]],
    gguf: GGUFNames | None = None,
) -> Family:
    """The family of `Decoder`s with this reader of configs and this table of weights; `Family` explains each."""
    return Family(
        architectures=architectures,
        model_types=model_types,
        read_config=read_config,
        build=Decoder,
        weights=weights,
        shardings=SHARDINGS,
        axis_sizes=axis_sizes,
        with_mesh_axes=with_mesh_axes,
        gguf=gguf,
    )
