"""The device's part of a step: the model, its weights and the cache behind one compiled function."""

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int32

from paged_attn_layer.engine.scheduler import Step
from paged_attn_layer.models import LlamaForCausalLM
from paged_cache import BatchShapes, CacheConfig, PagedAttentionCache, StepBatch, StepShape


class CompiledStep:
    """Runs steps. The cache is donated to each call and comes back updated in place; the weights stay where they are.

    Only the rows that give a next token get logits, and one array leaves the device: each sequence's likeliest token.
    """

    def __init__(
        self, model: LlamaForCausalLM, shapes: BatchShapes, cache_config: CacheConfig, mesh: Mesh | None
    ) -> None:
        """Allocate the cache; nothing compiles before the first call.

        Args:
            model: what to compute, its weights already placed.
            shapes: the shapes that steps are padded to.
            cache_config: the cache's sizes.
            mesh: the devices that share the cache; `None` for the default one.
        """
        self._shapes = shapes
        self._cache_config = cache_config
        cache = PagedAttentionCache.init_cache(mesh, None, cache_config, None)
        placed = jax.tree.map(lambda pages: pages.sharding, cache)
        self._cache = jax.device_put(cache, placed)  # committed, as results are: else the second call compiles again
        self._replicated = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        graph, self._weights = nnx.split(model)
        self._run = jax.jit(
            functools.partial(_next_tokens, graph), donate_argnames="cache", out_shardings=(None, placed)
        )

    def warm_up(self, each: Callable[[list[StepShape]], Iterable[StepShape]] = iter) -> None:
        """Compile every shape by a step without sequences, which leaves the cache as it is.

        Args:
            each: wraps the list of shapes, for instance in a progress bar.
        """
        for shape in each(self._shapes.all_shapes()):
            self(self._shapes.warm_up_batch(shape))

    def batch(self, step: Step) -> StepBatch:
        """The step's arrays on the host, padded to one of the fixed shapes."""
        return self._shapes.build(
            [part.sequence for part in step.work],
            num_pages=self._cache_config.num_pages,
            page_size=self._cache_config.page_size,
            token_ids=[token for part in step.work for token in part.token_ids],
        )

    def __call__(self, batch: StepBatch) -> np.ndarray:
        """Send a step to the device and run it; the next token of each sequence slot, on the host."""
        sent = jax.device_put(batch, self._replicated)  # the one transfer
        next_tokens, self._cache = self._run(self._weights, self._cache, sent)
        return np.asarray(next_tokens)


def _next_tokens(
    graph: nnx.GraphDef,
    weights: nnx.State,
    cache: PagedAttentionCache,
    step: StepBatch,
) -> tuple[Int32[Array, " seqs"], PagedAttentionCache]:
    """The likeliest token after the last row of each sequence, and the cache with the rows' keys and values."""
    model = nnx.merge(graph, weights)
    logits, cache = model(step.token_ids, step.positions, cache, step.batch, step.last_rows)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache
