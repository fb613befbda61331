"""Compiles a step of a model for a slice of TPUs, in its own process, because libtpu may abort at the end.

    python -m tpu_costing.model_compilation '{"model": NAME, "topology": "v5e:2x4", "rows": N, ...}'

The last line of the output is a JSON object with what each device holds and sends.
"""

import json
import math
import sys
from collections import Counter
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh

from paged_attn_layer import AttentionConfig, DecoderConfig, MoEConfig, read_config
from paged_cache import StepShape
from tpu_costing.child_process import answer
from tpu_costing.collectives import by_kind, read_collectives
from tpu_costing.model_cost import MODELS
from tpu_costing.model_step import ModelStep, StepSizes, bytes_on_device, lower_step


def main() -> None:
    """Compile the step of the command line."""
    order = json.loads(sys.argv[1])
    devices = topologies.get_topology_desc(platform="tpu", topology_name=order["topology"]).devices
    settings = json.loads((MODELS / f"{order['model']}.json").read_text())
    groups = len(read_config(settings).cache_spec.pool_groups())
    sizes = sizes_of(order, groups)
    step = lower_step(settings, Mesh(np.array(devices), ("tp",)), sizes)
    compiled = step.lowered.compile()
    memory = compiled.memory_analysis()
    if memory is None:
        raise RuntimeError("libtpu tells no memory of the compiled step; use the version in constraints/tested.txt")
    answer(
        {
            "devices": len(devices),
            "groups": groups,
            "weights": weights_of(step),
            "weights_bytes": bytes_on_device(step.weights),
            "experts_per_row": experts_per_row(step.config),
            "attention": attention_of(step.config, len(devices)),
            "pages_bytes": bytes_on_device(step.cache),
            "num_pages": sizes.num_pages,
            "in_place_bytes": memory.alias_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes,
            "collectives": collectives_of(compiled),
        }
    )


def sizes_of(order: dict[str, int], groups: int) -> StepSizes:
    """Returns the sizes that the question has, with pages for all its sequences."""
    return StepSizes(
        shape=StepShape(order["rows"], order["max_q_len"]),
        max_seqs=order["seqs"],
        pages_per_seq=order["pages_per_seq"],
        num_pages=1 + order["seqs"] * order["pages_per_seq"] * groups,
        page_size=order["page_size"],
    )


def weights_of(step: ModelStep) -> dict[str, int]:
    """Returns the elements on each device that a step multiplies with: of the experts, the head, and the rest."""
    head = "embed" if step.config.tie_word_embeddings else "lm_head"
    sizes = {"experts": 0, "head": 0, "rest": 0}
    for path, weight in nnx.to_flat_state(step.weights):
        if "embed" in path and head != "embed":
            continue  # a step reads a few of its rows
        kind = "experts" if "experts" in path else "head" if head in path else "rest"
        array = jax.tree.leaves(weight)[0]
        sizes[kind] += math.prod(array.sharding.shard_shape(array.shape))
    return sizes


def collectives_of(compiled: jax.stages.Compiled) -> dict[str, tuple[int, int]] | None:
    """Returns the collectives by kind; `None` if libtpu cannot print the program, as with some experts."""
    try:
        return by_kind(read_collectives(compiled.as_text() or ""))
    except jax.errors.JaxRuntimeError as error:
        if "RET_CHECK" not in str(error):
            raise
        return None


def experts_per_row(config: DecoderConfig) -> float:
    """Returns the share of the experts that compute a row; 0 without experts."""
    routers = (layer.mlp.router for layer in config.layers if isinstance(layer.mlp, MoEConfig))
    return next((router.experts_per_token / router.num_experts for router in routers), 0)


def attention_of(config: DecoderConfig, devices: int) -> list[dict[str, Any]]:
    """Returns the shapes of attention on each device, and how many layers have each.

    Raises:
        NotImplementedError: a layer has latent attention, for which there is no workload.
    """
    kinds = []
    for attention, layers in Counter(layer.attention for layer in config.layers).items():
        if not isinstance(attention, AttentionConfig):
            raise NotImplementedError("latent attention is not supported: the cost model has no workload for it")
        parts = 1 if attention.num_kv_heads % devices else devices
        shape = {
            "q_heads": attention.num_heads // parts,
            "kv_heads": attention.num_kv_heads // parts,
            "head_dim": attention.head_dim,
            "window": attention.sliding_window,
        }
        kinds.append({"layers": layers, "shape": shape})
    return kinds


if __name__ == "__main__":
    main()
