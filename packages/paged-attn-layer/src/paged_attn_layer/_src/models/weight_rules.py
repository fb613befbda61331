"""Rules from Hugging Face weights to the weights of a `Decoder`, by block. A family's table is made of these.

A rule has no effect where the model does not have its weights, so one table serves models with and without biases or
norms of queries and keys.
"""

from collections.abc import Mapping

from paged_attn_layer._src.blocks.moe import MoEConfig
from paged_attn_layer._src.convert.operations import Split, Stack, Transpose
from paged_attn_layer._src.convert.weights import WeightRule, linear, rename, unused
from paged_attn_layer._src.models.decoder_config import DecoderConfig

THEIRS, OURS = "model.layers.{layer}", "layers.{layer}"
"""How the names of a layer's weights begin."""

EMBEDDING = rename("model.embed_tokens.weight", "embed.embedding")
FINAL_NORM = rename("model.norm.weight", "norm.scale")
ATTENTION = (
    *linear(f"{THEIRS}.self_attn.{{q|k|v|o}}_proj", f"{OURS}.attention.{{q|k|v|o}}_proj"),
    rename(f"{THEIRS}.self_attn.{{q|k}}_norm.weight", f"{OURS}.attention.{{q|k}}_norm.scale"),
    unused(f"{THEIRS}.self_attn.rotary_emb.inv_freq"),  # old checkpoints; follows from the config
)
MLP = linear(f"{THEIRS}.mlp.{{gate|up|down}}_proj", f"{OURS}.mlp.{{gate|up|down}}_proj")


def layer_norm(theirs: str, ours: str) -> WeightRule:
    """The scale of one norm of a layer.

    Args:
        theirs: its name in the checkpoint's layer.
        ours: its name in `DecoderLayer`.
    """
    return rename(f"{THEIRS}.{theirs}.weight", f"{OURS}.{ours}.scale")


def head(config: DecoderConfig) -> tuple[WeightRule, ...]:
    """The head: its own weight, or the embedding. A file of a tied model may have the head alone, or both."""
    if config.tie_word_embeddings:
        return rename("lm_head.weight", "embed.embedding"), unused("lm_head.weight")
    return (rename("lm_head.weight", "lm_head"),)


def router(theirs: str = "mlp.gate") -> tuple[WeightRule, ...]:
    """The router of a `MoE` layer.

    Args:
        theirs: its name in the checkpoint's layer.
    """
    return linear(f"{THEIRS}.{theirs}", f"{OURS}.mlp.router")


def experts(
    config: DecoderConfig, theirs: str = "mlp.experts", names: Mapping[str, str] | None = None
) -> tuple[WeightRule, ...]:
    """The experts of `MoE` layers: a linear layer each, or stacked with gate and up as one, as transformers 5 has them.

    Args:
        config: of a model with such layers.
        theirs: what comes before the number of an expert, in the checkpoint's layer.
        names: what an expert's `gate`, `up` and `down` are called there; `None` means `gate_proj` and so on.
    """
    moe = next(layer.mlp for layer in config.layers if isinstance(layer.mlp, MoEConfig))
    stack, ours = (Stack(moe.router.num_experts), Transpose()), f"{OURS}.mlp.experts"
    split = Split(axis=1, sizes=(moe.intermediate_size, moe.intermediate_size))
    each = names or {part: f"{part}_proj" for part in ("gate", "up", "down")}
    stacked = f"{THEIRS}.mlp.experts"
    return (
        *(
            rename(f"{THEIRS}.{theirs}.{{expert}}.{name}.weight", f"{ours}.{part}_proj", *stack)
            for part, name in each.items()
        ),
        WeightRule((f"{stacked}.gate_up_proj",), (f"{ours}.gate_proj", f"{ours}.up_proj"), (split, Transpose())),
        rename(f"{stacked}.down_proj", f"{ours}.down_proj", Transpose()),
    )


def fused_qkv(config: DecoderConfig, name: str = "qkv_proj") -> tuple[WeightRule, ...]:
    """Queries, keys and values as one linear layer, in this order."""
    attention = config.layers[0].attention
    kv_size = attention.kv.num_kv_heads * attention.kv.head_dim
    sizes = (attention.num_heads * attention.kv.head_dim, kv_size, kv_size)
    return _fused(f"self_attn.{name}", tuple(f"attention.{part}_proj" for part in "qkv"), sizes)


def fused_gate_up(config: DecoderConfig, name: str = "gate_up_proj") -> tuple[WeightRule, ...]:
    """The gate and the up projection of an MLP as one linear layer, in this order."""
    size = config.layers[0].mlp.intermediate_size
    return _fused(f"mlp.{name}", ("mlp.gate_proj", "mlp.up_proj"), (size, size))


def _fused(theirs: str, ours: tuple[str, ...], sizes: tuple[int, ...]) -> tuple[WeightRule, ...]:
    split = Split(axis=0, sizes=sizes)
    kernels, biases = (tuple(f"{OURS}.{name}.{kind}" for name in ours) for kind in ("kernel", "bias"))
    return (
        WeightRule((f"{THEIRS}.{theirs}.weight",), kernels, (split, Transpose())),
        WeightRule((f"{THEIRS}.{theirs}.bias",), biases, (split,)),
    )
