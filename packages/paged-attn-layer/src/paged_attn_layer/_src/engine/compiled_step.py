"""The device's part of a step: the model, its weights and the cache behind one compiled function."""

import functools
from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int32

from paged_attn_layer._src.engine.sampling import greedy_rows, row_type, sample
from paged_attn_layer._src.models.causal_lm import CausalLM
from paged_cache import (
    BatchShapes,
    CacheConfig,
    PagedAttentionCache,
    PageMoves,
    StepBatch,
    StepShape,
    apply_moves,
    kv_head_axis,
    warm_up_moves,
)


class CompiledStep:
    """Runs steps. The cache is donated to each call and comes back updated in place; the weights stay where they are.

    Only the last row of each sequence gets logits. One array leaves the device: the next token of each sequence. The
    model's program gives the likeliest tokens, so a greedy step runs nothing else. Logits stay on the device.
    """

    def __init__(self, model: CausalLM, shapes: BatchShapes, cache_config: CacheConfig, mesh: Mesh | None) -> None:
        """Allocate the cache; nothing compiles before the first call.

        Args:
            model: what to compute, its weights already placed.
            shapes: the shapes that steps are padded to.
            cache_config: the cache's sizes.
            mesh: the devices that share the cache; `None` for the default one.
        """
        self._shapes = shapes
        self._allocate = functools.partial(_committed_cache, mesh, cache_config)
        self._cache: PagedAttentionCache | None = self._allocate()
        placed = jax.tree.map(lambda pages: pages.sharding, self._cache)
        self._replicated = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        graph, self._weights = nnx.split(cast(nnx.Module, model))
        self._run = jax.jit(
            functools.partial(_next_tokens, graph),
            donate_argnames="cache",
            out_shardings=(self._replicated, _logits_sharding(model, mesh), placed),
        )

    @property
    def shapes(self) -> list[StepShape]:
        """The shapes that steps can have."""
        return self._shapes.all_shapes()

    def warm_up(self, shape: StepShape) -> None:
        """Compile one shape by a step without sequences; the cache stays as it is."""
        self(self._shapes.warm_up_batch(shape))

    def warm_up_sampler(self, max_sequence_length: int) -> None:
        """Compile the two programs of `sampling`; the cache stays as it is."""
        for kind in (row_type(None), row_type(max_sequence_length)):
            self(self._shapes.warm_up_batch(self.shapes[0]), greedy_rows(kind, self._shapes.max_seqs))

    def warm_up_moves(self) -> None:
        """Compile the copies of pages: one of each sequence in each group. The cache stays as it is."""
        self._cache = warm_up_moves(self._owned_cache(), self._shapes.max_seqs * self._shapes.groups)

    def apply(self, moves: Sequence[PageMoves]) -> None:
        """Copy the pages that the page manager wants copied."""
        self._cache = apply_moves(self._owned_cache(), moves)

    def __call__(self, batch: StepBatch, rows: np.ndarray | None = None) -> np.ndarray:
        """Send a step to the device and run it; the next token of each sequence slot, on the host.

        Args:
            batch: the step.
            rows: how each sequence's token is chosen (`pack_rows`); `None`: the likeliest.
        """
        words = None if rows is None else rows.view(np.int32).reshape(len(rows), -1)
        batch, words = jax.device_put((batch, words), self._replicated)  # the one transfer
        next_tokens, logits, self._cache = self._run(self._weights, self._owned_cache(), batch)
        if rows is not None:
            next_tokens = sample(logits, words, rows.dtype)
        return jax.device_get(next_tokens)

    def drop_cache(self) -> None:
        """Free the cache, whatever is left of it after a call that failed. The next call begins with an empty one."""
        for array in jax.tree.leaves(self._cache):
            if not array.is_deleted():
                array.delete()
        self._cache = None

    def _owned_cache(self) -> PagedAttentionCache:
        return self._allocate() if self._cache is None else self._cache


def _logits_sharding(model: CausalLM, mesh: Mesh | None) -> NamedSharding | None:
    """How logits stay on a mesh: split as the head is, by the vocabulary. Only the sampler brings them together."""
    return None if mesh is None else NamedSharding(mesh, PartitionSpec(None, kv_head_axis(mesh, model.vocab_size)))


def _committed_cache(mesh: Mesh | None, config: CacheConfig) -> PagedAttentionCache:
    """An empty cache, committed to its devices as results are: else the second call compiles again."""
    cache = PagedAttentionCache.init_cache(mesh, None, config, None)
    return jax.device_put(cache, jax.tree.map(lambda pages: pages.sharding, cache))


def _next_tokens(
    graph: nnx.GraphDef,
    weights: nnx.State,
    cache: PagedAttentionCache,
    step: StepBatch,
) -> tuple[Int32[Array, " seqs"], Float[Array, "seqs vocab"], PagedAttentionCache]:
    """The likeliest token after the last row of each sequence, its logits, and the cache with new keys and values."""
    model = cast(CausalLM, nnx.merge(graph, weights))
    batches = tuple(step.group(index) for index in range(step.layout.groups))
    logits, cache = model(step.token_ids, step.positions, cache, batches, step.last_rows)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), logits, cache
