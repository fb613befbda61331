"""The step of a whole model, lowered for devices that need not be here, with shapes in place of weights and pages."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from paged_attn_layer._src.models.registry import find_family
from paged_cache import (
    BatchShapes,
    HFConfig,
    KVShape,
    PagedAttentionCache,
    PagedAttentionCacheView,
    StepBatch,
    StepShape,
    kv_head_axis,
)
from paged_kernels import KVPages


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepSizes:
    """Sizes of a step and of its cache."""

    shape: StepShape
    """Rows, and the most rows of one sequence."""
    max_seqs: int
    """Sequences of the step."""
    pages_per_seq: int
    """Length of a page table."""
    num_pages: int
    """Pages of each view."""
    page_size: int
    """Tokens of a page."""


@dataclasses.dataclass(frozen=True)
class ModelStep:
    """A lowered step, and what it is given."""

    config: Any
    """The family's config."""
    weights: nnx.State
    """Shapes of the weights, and how they are split."""
    cache: PagedAttentionCache
    """Shapes of the pages, and how they are split."""
    lowered: jax.stages.Lowered


def lower_step(settings: Mapping[str, Any], mesh: Mesh, sizes: StepSizes, dtype: DTypeLike = jnp.bfloat16) -> ModelStep:
    """A greedy step of the model that a config.json describes, lowered for the devices of `mesh`.

    The weights are split as `load_model` splits them, the pages as the engine's are.
    """
    family = find_family(HFConfig.of(settings))
    config = family.read_config(HFConfig.of(settings))
    graph, state = nnx.split(nnx.eval_shape(lambda: family.build(config, param_dtype=dtype, rngs=nnx.Rngs(0))))

    def placed(path: tuple[str | int, ...], weight: nnx.Variable) -> nnx.Variable:
        spec = family.partition_spec(".".join(map(str, path)), config, mesh)
        return weight.replace(on_devices(weight, NamedSharding(mesh, spec)))

    def next_tokens(weights: nnx.State, cache: PagedAttentionCache, step: StepBatch) -> Any:
        batches = tuple(step.group(index) for index in range(step.layout.groups))
        logits, cache = nnx.merge(graph, weights)(step.token_ids, step.positions, cache, batches, step.last_rows)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

    spec = config.cache_spec
    cache = PagedAttentionCache(tuple(view_of(shape, mesh, sizes, dtype) for shape in spec.views()))
    shapes = BatchShapes((sizes.shape.tokens,), sizes.max_seqs, sizes.pages_per_seq, len(spec.pool_groups()))
    everywhere = NamedSharding(mesh, PartitionSpec())
    step = jax.tree.map(lambda leaf: on_devices(leaf, everywhere), shapes.warm_up_batch(sizes.shape))
    out = (None, jax.tree.map(lambda pages: pages.sharding, cache))
    run = jax.jit(next_tokens, donate_argnums=1, out_shardings=out)
    weights = nnx.map_state(placed, state)
    return ModelStep(config, weights, cache, run.lower(weights, cache, step))


def view_of(shape: KVShape, mesh: Mesh, sizes: StepSizes, dtype: DTypeLike) -> PagedAttentionCacheView:
    """One view of the cache, with shapes in place of pages."""
    pages = KVPages.shapes(
        sizes.num_pages,
        sizes.page_size,
        shape.num_kv_heads,
        shape.head_dim,
        shape.dtype or dtype,
        v_head_dim=shape.v_head_dim,
        latent=shape.latent,
    )
    axis = kv_head_axis(mesh, shape.num_kv_heads)
    where = NamedSharding(mesh, KVPages.partition_spec(axis, None))
    return PagedAttentionCacheView(jax.tree.map(lambda leaf: on_devices(leaf, where), pages), mesh, axis)


def on_devices(array: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """The array's shape and dtype, placed."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def bytes_on_device(tree: Any) -> int:
    """The bytes that each device holds of the arrays, without padding."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
