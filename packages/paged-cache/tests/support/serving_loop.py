"""A serving loop without a model: keys and values follow from a sequence's tokens, so that all of it can be checked."""

import functools
import itertools

import jax
import numpy as np

from paged_cache import (
    BatchShapes,
    CacheConfig,
    KVShape,
    LayerGroup,
    PagedAttentionCache,
    PageManager,
    apply_moves_by_replica,
    stack_batches,
)
from paged_cache._src.cache.sharding import sharded_call
from paged_cache.transfer import HostPages
from paged_kernels import AttentionSpec, paged_attention

PAGE_SIZE, HEAD_DIM = 4, 4
BACKEND = "reference"  # compiles in a third of the time
GROUPS = (LayerGroup.full((0,)), LayerGroup.window(6, (1,)))
SHAPES = BatchShapes(tokens=(32,), max_seqs=4, pages_per_seq=6, groups=len(GROUPS))
(_, SHAPE) = SHAPES.all_shapes()  # decodes too are padded to this, so that little is compiled
LENGTHS = {"max_seqs": SHAPES.max_seqs, "max_sequence_length": SHAPES.pages_per_seq * PAGE_SIZE}
POOL = {"num_pages": 18, "page_size": PAGE_SIZE}
PROMPTS = [range(10, 20), range(30, 43)]
NUMBERS = np.random.default_rng(0).normal(size=(len(GROUPS), 2, 997, 4, HEAD_DIM)).astype(np.float32)


def rows_of(token_ids, heads):
    """Keys and values `[layers, 2, tokens, heads, head_dim]`; a token's depend on all tokens up to it."""
    states = list(itertools.accumulate(token_ids, lambda state, token: (31 * state + int(token)) % 997, initial=1))
    return NUMBERS[:, :, states[1:], :heads]


class ServingLoop:
    """A cache, and a page manager for each of its replicas."""

    def __init__(self, mesh=None, heads=4, data_axis=None):
        config = CacheConfig(
            **POOL,
            views=(KVShape(num_kv_heads=heads, head_dim=HEAD_DIM),),
            max_sequence_length=LENGTHS["max_sequence_length"],
            max_seqs=SHAPES.max_seqs,
            dtype="float32",
        )
        self.heads = heads
        self.cache = PagedAttentionCache.init_cache(mesh, None, config, None, data_axis=data_axis)
        self.host = HostPages.create(self.cache, 6)
        replicas = range(self.cache.views[0].replicas)
        self.managers = [PageManager(**POOL, **LENGTHS, groups=GROUPS, num_host_pages=6) for _ in replicas]

    def lives(self, first=0):
        """Which sequences of each replica run in each step; the replicas have the prompts from `first` on."""
        return map(list, zip(*map(life, self.managers, PROMPTS[first:]), strict=False))

    def step(self, running):
        """Compute the remaining tokens of these sequences, one list per replica. Returns each row's attention."""
        self.cache = apply_moves_by_replica(self.cache, [m.take_moves() for m in self.managers], self.host)
        groups = list(zip(self.managers, running, strict=True))
        left = [m.lengths(seqs) - m.computed(seqs) for m, seqs in groups]
        steps = [SHAPES.pack_seqs(manager, seqs, shape=SHAPE) for manager, seqs in groups]
        rows = [self._rows_left(m, seqs) for m, seqs in groups]
        if self.cache.views[0].data_axis is None:
            (rows,), (step,) = rows, steps
        else:
            rows, step = np.stack(rows, axis=2), stack_batches(steps)
        self.cache, outputs = write_and_attend(self.cache, rows, step)
        for (manager, seqs), n in zip(groups, left, strict=True):
            manager.commit(seqs, n)
        self.newest_rows = [np.cumsum(n) - 1 for n in left]
        return outputs

    def check(self, running, outputs):
        """Check the pages that later queries see, and the attention of each newest token."""
        (view,) = self.cache.views
        stored = np.stack([view.key_pages, view.value_pages])  # [2, heads, pages, page_size, head_dim]
        pools = np.split(stored, len(self.managers), axis=2)
        outputs = np.stack(outputs).reshape(len(GROUPS), len(self.managers), -1, self.heads, HEAD_DIM)
        for at, manager in enumerate(self.managers):
            newest = outputs[:, at, self.newest_rows[at]]
            for seq, attended in zip(running[at], newest.swapaxes(0, 1), strict=True):
                rows = rows_of(manager.token_ids(seq), self.heads)
                tables = manager.page_tables(seq)[:, 0]
                for group, table, (keys, values), output in zip(GROUPS, tables, rows, attended, strict=True):
                    later = np.arange(group.first_needed(len(keys)), len(keys))
                    stored = pools[at][:, :, table[later // PAGE_SIZE], later % PAGE_SIZE]
                    np.testing.assert_array_equal(stored.swapaxes(1, 2), [keys[later], values[later]])
                    now = slice(-group.tokens or None, None)
                    np.testing.assert_allclose(output, attention_of_last(keys[now], values[now]), rtol=1e-5, atol=1e-6)

    def _rows_left(self, manager, seqs):
        """Keys and values of the remaining tokens, as `rows_of`. Padding is 7 and must not be stored."""
        rows = np.full((len(GROUPS), 2, SHAPE.tokens, self.heads, HEAD_DIM), 7, np.float32)
        start = 0
        for seq in seqs:
            left = rows_of(manager.token_ids(seq), self.heads)[:, :, manager.computed(seq)[0] :]
            rows[:, :, start : start + left.shape[2]] = left
            start += left.shape[2]
        return rows


def life(manager, prompt):
    """Sequences of one replica, from admission to eviction; yields those that run in each step."""
    first = manager.admit(prompt)
    yield [first]
    (twin,) = manager.fork(first)
    manager.extend([first, twin], 1, [1, 2])  # one of them gets a copy of their last page
    yield [first, twin]
    manager.swap_out(first)
    other = manager.admit([*prompt[:-1], 3, 4])  # shares full pages, and copies one for its start
    manager.extend(twin, 2, [5, 6])
    yield [twin, other]
    manager.release([twin, other])
    long = manager.admit(range(100, 124))
    yield [long]
    manager.release(long)
    manager.swap_in(first)
    manager.extend(first, 1, [8])
    again = manager.admit(prompt)
    yield [first, again]


@functools.partial(jax.jit, donate_argnums=0)
def write_and_attend(cache, rows, step):
    """The cache with the step's keys and values, and each layer's attention; its keys are its queries too."""
    (view,) = cache.views
    outputs = []
    for index, (group, (key, value)) in enumerate(zip(GROUPS, rows, strict=True)):
        view = view.write(key, value, step.group(index))
        outputs.append(attend(view, key, step.group(index), AttentionSpec(sliding_window=group.tokens or None)))
    return PagedAttentionCache((view,)), outputs


def attend(view, q, batch, spec):
    if view.mesh is None:
        return paged_attention(q, view.pages, batch, spec, backend=BACKEND)

    def part(q, pages, batch):
        if view.data_axis is None:
            return paged_attention(q, pages, batch, spec, backend=BACKEND)
        q, batch = jax.tree.map(lambda leaf: leaf[0], (q, batch))  # each device sees the step of its replica
        return paged_attention(q, pages, batch, spec, backend=BACKEND)[None]

    specs = (view.rows_spec, view.pages_spec, view.batch_spec)
    return sharded_call(part, view.mesh, specs, view.rows_spec, q, view.pages, batch)


def attention_of_last(keys, values):
    """Of the last of these tokens `[tokens, heads, head_dim]`, whose query is its key."""
    logits = np.einsum("hd,thd->th", keys[-1], keys) / np.sqrt(HEAD_DIM)
    weights = np.exp(logits - logits.max(0))
    return np.einsum("th,thd->hd", weights / weights.sum(0), values)
