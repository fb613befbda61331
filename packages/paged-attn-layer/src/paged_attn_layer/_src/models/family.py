"""What a model family declares: how its checkpoints are read, and its models built, filled and split."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from paged_attn_layer._src.convert.gguf_names import GGUFNames
from paged_attn_layer._src.convert.weights import WeightRule
from paged_attn_layer._src.models.causal_lm import CausalLM
from paged_attn_layer._src.models.sharding import AxisNames, partition_spec
from paged_cache import HFConfig, PartitionManager


class BuildModel(Protocol):
    """Makes a model with random weights from its family's config."""

    def __call__(self, config: Any, *, param_dtype: DTypeLike, rngs: nnx.Rngs) -> CausalLM:
        """The model, with weights of type `param_dtype`."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A model family. Each is one file, `models/<family>.py`, and one entry of `models/registry.py`."""

    architectures: tuple[str, ...]
    """Its names in the `architectures` of a config.json."""
    model_types: tuple[str, ...]
    """Its names in the `model_type` of a config.json, for a config without `architectures`."""
    read_config: Callable[[HFConfig], Any]
    """Makes the family's config from a config.json. Refuses what the model cannot compute."""
    build: BuildModel
    """Makes a model from the family's config."""
    weights: Callable[[Any], tuple[WeightRule, ...]]
    """The rules from Hugging Face weights to the weights of a model with this config."""
    shardings: tuple[tuple[str, AxisNames], ...]
    """Templates of weight paths, each with the names of the weight's axes; `None` is an axis that is never split.

    Every device holds a weight that is not here whole.
    """
    axis_sizes: Callable[[Any, str], Mapping[str, int]]
    """How many parts each named axis of a weight may be cut into, for a config and the weight's path.

    Query heads go with the KV heads they share. Layers may differ.
    """
    with_mesh_axes: Callable[[Any, PartitionManager | None], Any] = lambda config, _manager: config
    """The config with the names of mesh axes that the model itself uses, as the partition manager has them."""
    gguf: GGUFNames | None = None
    """How a GGUF file of the family is read; `None` if it cannot be."""

    def partition_spec(
        self, path: str, config: Any, mesh: Mesh, partition_manager: PartitionManager | None = None
    ) -> PartitionSpec:
        """How the weight at `path` of a model with this config is split over the mesh."""
        return partition_spec(path, self.shardings, self.axis_sizes(config, path), mesh, partition_manager)
