"""How a model's weights are split over a mesh: the one table."""

import re

from jax.sharding import Mesh, PartitionSpec

from paged_attn_layer._src.models.config import ModelConfig
from paged_cache import PartitionManager, kv_head_axis

_TABLE = (
    (r"(embed\.embedding|lm_head)", ("vocab", None)),
    (r"layers\.\d+\.attention\.[qkv]_proj\.kernel", (None, "heads")),
    (r"layers\.\d+\.attention\.[qkv]_proj\.bias", ("heads",)),
    (r"layers\.\d+\.attention\.o_proj\.kernel", ("heads", None)),
    (r"layers\.\d+\.mlp\.(gate|up)_proj\.kernel", (None, "mlp")),
    (r"layers\.\d+\.mlp\.(gate|up)_proj\.bias", ("mlp",)),
    (r"layers\.\d+\.mlp\.down_proj\.kernel", ("mlp", None)),
)
"""What each weight's axes are, by its path in the model; a weight that is not here is on every device."""


def partition_spec(
    path: str, config: ModelConfig, mesh: Mesh, partition_manager: PartitionManager | None = None
) -> PartitionSpec:
    """How the weight at `path` is split: heads, MLP and vocabulary over the tensor-parallel axis.

    An axis that does not divide is on every device whole. Query heads follow the KV heads that they share.

    >>> import jax
    >>> config = ModelConfig.from_hf(dict(
    ...     architectures=["LlamaForCausalLM"], vocab_size=512, hidden_size=64, intermediate_size=96,
    ...     num_hidden_layers=1, num_attention_heads=9, num_key_value_heads=3, head_dim=8))
    >>> tuple(partition_spec("layers.0.mlp.down_proj.kernel", config, jax.make_mesh((1,), ("tp",))))
    ('tp', None)
    """
    sizes = {
        "vocab": config.vocab_size,
        "heads": config.num_key_value_heads,
        "mlp": config.intermediate_size,
    }
    for pattern, axes in _TABLE:
        if re.fullmatch(pattern, path):
            # The rule by which the cache splits KV heads, so that weights and pages are split alike.
            return PartitionSpec(*(axis and kv_head_axis(mesh, sizes[axis], partition_manager) for axis in axes))
    return PartitionSpec()
