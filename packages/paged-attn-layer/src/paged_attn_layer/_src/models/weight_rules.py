"""Rules from Hugging Face weights to the weights of a `Decoder`, by block. A family's table is made of these.

A rule has no effect where the model does not have its weights, so one table serves models with and without biases or
norms of queries and keys.
"""

from paged_attn_layer._src.convert.operations import Split, Transpose
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


def fused_qkv(config: DecoderConfig, name: str = "qkv_proj") -> tuple[WeightRule, ...]:
    """Queries, keys and values as one linear layer, in this order."""
    attention = config.layers[0].attention
    kv_size = attention.num_kv_heads * attention.head_dim
    sizes = (attention.num_heads * attention.head_dim, kv_size, kv_size)
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
