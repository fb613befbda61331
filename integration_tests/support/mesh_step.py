"""A step of a model on a mesh: replicas of sequences over `dp`, heads and rows of MLPs over `tp`, experts over `ep`."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from paged_attn_layer._src.engine.compiled_step import _next_tokens as next_tokens
from paged_attn_layer._src.models.registry import find_family
from paged_cache import BatchShapes, CacheConfig, HFConfig, PagedAttentionCache, PageManager, stack_batches

PAGE_SIZE, PAGES_PER_SEQ, MAX_SEQS, ROWS = 4, 5, 3, 24
LENGTHS = {"max_seqs": MAX_SEQS, "max_sequence_length": PAGES_PER_SEQ * PAGE_SIZE}


def mesh_of(**axes):
    """A mesh of the first CPU devices."""
    count = math.prod(axes.values())
    return Mesh(np.array(jax.devices()[:count]).reshape(*axes.values()), tuple(axes))


class MeshStep:
    """One compiled shape of a model's step, on one device or on a mesh."""

    def __init__(self, settings, mesh=None):
        family = find_family(HFConfig.of(settings))
        config = family.read_config(HFConfig.of(settings))
        model = family.build(config, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
        self.graph, weights = nnx.split(model)
        rng = np.random.default_rng(0)  # biases, sinks and norms that are not 0 or 1
        self.weights = jax.tree.map(lambda array: array + 0.2 * rng.standard_normal(array.shape, np.float32), weights)
        self.data_axis = "dp" if mesh is not None and "dp" in mesh.shape else None
        self.replicas = 1 if self.data_axis is None else mesh.shape["dp"]
        self.mesh, spec = mesh, config.cache_spec
        if mesh is not None:
            self.weights = nnx.map_state(lambda path, weight: self._placed(family, config, path, weight), self.weights)
        self.groups = spec.pool_groups()
        self.num_pages = 1 + MAX_SEQS * PAGES_PER_SEQ * len(self.groups)
        cache_config = CacheConfig.for_spec(
            spec, mesh, num_pages=self.num_pages, page_size=PAGE_SIZE, dtype=jnp.float32, **LENGTHS
        )
        cache = PagedAttentionCache.init_cache(mesh, None, cache_config, None, data_axis=self.data_axis)
        self.cache = jax.device_put(cache, jax.tree.map(lambda pages: pages.sharding, cache))

        def run(weights, cache, step):
            batches = tuple(step.group(index) for index in range(step.layout.groups))
            return nnx.merge(self.graph, weights)(step.token_ids, step.positions, cache, batches, step.last_rows)

        out = (None, jax.tree.map(lambda pages: pages.sharding, self.cache))
        self.run = jax.jit(run, donate_argnums=1, out_shardings=out)

    def logits(self, sequences):
        """Logits of the last token of each sequence; the sequences are dealt to the replicas, in order."""
        each = np.array_split(np.arange(len(sequences)), self.replicas)
        batch, logits = self.batch([[sequences[i] for i in part] for part in each]), []
        rows, self.cache = self.run(self.weights, self.cache, batch)
        rows = np.asarray(rows).reshape(self.replicas, MAX_SEQS, -1)
        for replica, part in enumerate(each):
            logits.append(rows[replica, : len(part)])
        return np.concatenate(logits)

    def batch(self, sequences):
        """The step that computes these sequences of each replica."""
        shapes, steps = BatchShapes((ROWS,), MAX_SEQS, PAGES_PER_SEQ, len(self.groups)), []
        for own in sequences:
            manager = PageManager(self.num_pages, PAGE_SIZE, groups=self.groups, **LENGTHS)
            seqs = [manager.admit(tokens) for tokens in own]
            q_lens = np.array([len(tokens) for tokens in own], np.int32)
            tokens = np.concatenate(own).astype(np.int32)
            steps.append(shapes.pack_seqs(manager, seqs, tokens, q_lens=q_lens, shape=shapes.all_shapes()[-1]))
        if self.data_axis is None:
            return steps[0] if self.mesh is None else jax.device_put(steps[0], self._on(PartitionSpec()))
        return jax.device_put(stack_batches(steps), self._on(PartitionSpec("dp")))

    @property
    def model(self):
        return nnx.merge(self.graph, self.weights)

    def compiled(self, tokens):
        """The engine's greedy step, compiled for a batch like that of one sequence in each replica.

        Its logits stay where they are computed. The engine sends all of them to every device, for the sampler.
        """
        out = (None, None, jax.tree.map(lambda pages: pages.sharding, self.cache))
        run = jax.jit(functools.partial(next_tokens, self.graph), donate_argnames="cache", out_shardings=out)
        return run.lower(self.weights, self.cache, self.batch([[tokens]] * self.replicas)).compile()

    def _placed(self, family, config, path, weight):
        spec = family.partition_spec(".".join(map(str, path)), config, self.mesh)
        return weight.replace(jax.device_put(weight[...], self._on(spec)))

    def _on(self, spec):
        return NamedSharding(self.mesh, spec)
