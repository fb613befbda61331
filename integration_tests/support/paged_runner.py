"""A model served step by step on layer 2, without the engine: each step computes what the test says."""

import jax.numpy as jnp
import numpy as np

from paged_cache import BatchShapes, CacheConfig, PagedAttentionCache, PagePool, ScheduledSequence

PAGE_SIZE = 16


class PagedRunner:
    """Keeps each sequence's pages and length, and calls the model without an outer `jax.jit`.

    So only one layer is compiled per shape, not thirty; the engine's tests compile whole steps.
    """

    def __init__(self, model, *, mesh=None, tokens=(96,), seqs=8, pages_per_seq=8, kv_dtype=jnp.float32):
        self._model = model
        self._shapes = BatchShapes(tokens=tokens, max_seqs=seqs, pages_per_seq=pages_per_seq)
        self._pool = PagePool(1 + seqs * pages_per_seq)
        self._pages: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        sizes = CacheConfig(
            num_hidden_layers=model.config.num_hidden_layers,
            num_pages=self._pool.num_pages,
            page_size=PAGE_SIZE,
            num_kv_heads=model.config.num_key_value_heads,
            head_dim=model.config.head_dim,
            max_sequence_length=pages_per_seq * PAGE_SIZE,
            batch_size=seqs,
            dtype=kv_dtype,
        )
        self._cache = PagedAttentionCache.init_cache(mesh, None, sizes, None)

    def step(self, work: dict[int, list[int]]) -> dict[int, np.ndarray]:
        """Feed each sequence its next tokens; the logits `[tokens, vocab]` of every one of them."""
        counts = [len(tokens) for tokens in work.values()]
        logits = self._compute(work, lambda step: jnp.arange(len(step.positions), dtype=jnp.int32))
        return dict(zip(work, np.split(logits[: sum(counts)], np.cumsum(counts)[:-1]), strict=True))

    def greedy_step(self, work: dict[int, list[int]]) -> dict[int, int]:
        """Feed each sequence its next tokens; the likeliest token after the last of them."""
        logits = self._compute(work, lambda step: step.last_rows)
        return dict(zip(work, logits.argmax(axis=1).tolist(), strict=False))

    def _compute(self, work: dict[int, list[int]], rows) -> np.ndarray:
        scheduled = [self._schedule(sequence, len(tokens)) for sequence, tokens in work.items()]
        step = self._shapes.build(scheduled, num_pages=self._pool.num_pages, page_size=PAGE_SIZE)
        ids = np.zeros(step.positions.shape, np.int32)
        flat = [token for tokens in work.values() for token in tokens]
        ids[: len(flat)] = flat
        logits, self._cache = self._model(jnp.asarray(ids), step.positions, self._cache, step.batch, rows(step))
        return np.asarray(logits)

    def feed(self, tokens: list[int], chunks: list[int]) -> np.ndarray:
        """Logits of every token of one new sequence, fed in chunks of these sizes."""
        assert sum(chunks) == len(tokens)
        sequence, ends = len(self._pages), np.cumsum(chunks).tolist()
        parts = [tokens[end - size : end] for end, size in zip(ends, chunks, strict=True)]
        return np.concatenate([self.step({sequence: part})[sequence] for part in parts])

    def _schedule(self, sequence: int, count: int) -> ScheduledSequence:
        pages = self._pages.setdefault(sequence, [])
        length = self._lengths[sequence] = self._lengths.get(sequence, 0) + count
        pages += self._pool.allocate(-(-length // PAGE_SIZE) - len(pages)).tolist()
        return ScheduledSequence(list(pages), length, count)


def serve_greedy(runner: PagedRunner, prompts: list[list[int]], new_tokens: int, *, budget: int, chunk: int):
    """Greedy answers to prompts that arrive two steps apart, and how many steps mixed prefill with decode."""
    fed, answers = [0] * len(prompts), [[] for _ in prompts]
    now = mixed = 0
    while any(len(answer) < new_tokens for answer in answers):
        work, room = {}, budget
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            if 2 * i > now or len(answer) == new_tokens or not room:
                continue
            work[i] = [answer[-1]] if answer else prompt[fed[i] : fed[i] + min(chunk, room)]
            room -= len(work[i])
        mixed += any(answers[i] for i in work) and any(not answers[i] for i in work)
        for i, token in runner.greedy_step(work).items():
            fed[i] += len(work[i])
            if fed[i] >= len(prompts[i]):
                answers[i].append(token)
        now += 1
    return answers, mixed
