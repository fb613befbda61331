"""Runs a model step by step on the paged cache, without the engine. The test decides what each step computes."""

import jax.numpy as jnp
import numpy as np

from paged_cache import BatchShapes, CacheConfig, PagedAttentionCache, PageManager, apply_moves

PAGE_SIZE = 16


class PagedRunner:
    """Keeps the pages and the length of each sequence, and calls the model without `jax.jit`.

    So one layer is compiled per shape, not thirty. The engine's tests compile whole steps.
    """

    def __init__(
        self,
        model,
        *,
        mesh=None,
        tokens=(96,),
        max_seqs=8,
        page_size=PAGE_SIZE,
        pages_per_seq=8,
        kv_dtype=jnp.float32,
    ):
        self._model = model
        groups = model.cache_spec.pool_groups()
        sizes = {"max_seqs": max_seqs, "max_sequence_length": pages_per_seq * page_size}
        num_pages = 1 + max_seqs * pages_per_seq * len(groups)
        config = CacheConfig.for_spec(
            model.cache_spec, mesh, page_size=page_size, num_pages=num_pages, dtype=kv_dtype, **sizes
        )
        self._manager = PageManager(num_pages, page_size, groups=groups, **sizes)
        self._shapes = BatchShapes(tokens, max_seqs, pages_per_seq, len(groups))
        self._cache = PagedAttentionCache.init_cache(mesh, None, config, None)
        self._seqs: dict[int, int] = {}

    @property
    def pages_in_use(self) -> int:
        """Pages that sequences have."""
        return self._manager.num_used

    def preempt(self, name: int) -> None:
        """Take a sequence's pages. Its next step must begin with its first token."""
        self._manager.release(self._seqs.pop(name))

    def step(self, work: dict[int, list[int]]) -> dict[int, np.ndarray]:
        """Feed each sequence its next tokens. Returns the logits `[tokens, vocab]` of all of them, by sequence.

        A new sequence may find pages of another. Only the logits after those are returned.
        """
        logits, q_lens = self._compute(work, lambda step: jnp.arange(len(step.positions), dtype=jnp.int32))
        return dict(zip(work, np.split(logits[: sum(q_lens)], np.cumsum(q_lens)[:-1]), strict=True))

    def greedy_step(self, work: dict[int, list[int]]) -> dict[int, int]:
        """Feed each sequence its next tokens. Returns the likeliest token after the last of them, by sequence."""
        logits, _ = self._compute(work, lambda step: step.last_rows)
        return dict(zip(work, logits.argmax(axis=1).tolist(), strict=False))

    def _compute(self, work: dict[int, list[int]], rows) -> tuple[np.ndarray, np.ndarray]:
        """The logits of these rows of the step, and the number of tokens of each sequence that it computes."""
        for name, tokens in work.items():
            self._extend(name, tokens)
        self._cache = apply_moves(self._cache, self._manager.take_moves())
        seqs = [self._seqs[name] for name in work]
        q_lens = (self._manager.lengths(seqs) - self._manager.computed(seqs)).astype(np.int32)
        left = [tokens[len(tokens) - count :] for tokens, count in zip(work.values(), q_lens, strict=True)]
        step = self._shapes.pack_seqs(self._manager, seqs, np.concatenate(left).astype(np.int32), q_lens=q_lens)
        batches = tuple(step.group(index) for index in range(step.layout.groups))
        logits, self._cache = self._model(step.token_ids, step.positions, self._cache, batches, rows(step))
        self._manager.commit(seqs, q_lens)
        return np.asarray(logits), q_lens

    def feed(self, tokens: list[int], chunks: list[int]) -> np.ndarray:
        """Feed one new sequence in chunks of these sizes. Returns the logits of all its tokens."""
        assert sum(chunks) == len(tokens)
        sequence, ends = len(self._seqs), np.cumsum(chunks).tolist()
        parts = [tokens[end - size : end] for end, size in zip(ends, chunks, strict=True)]
        return np.concatenate([self.step({sequence: part})[sequence] for part in parts])

    def _extend(self, name: int, tokens: list[int]) -> None:
        """Give the sequence pages for its next tokens."""
        if name in self._seqs:
            self._manager.extend(self._seqs[name], len(tokens), tokens)
        else:
            self._seqs[name] = self._manager.admit(tokens)


def serve_greedy(runner: PagedRunner, prompts: list[list[int]], new_tokens: int, *, budget: int, chunk: int):
    """Answer prompts that arrive two steps apart. Returns the greedy answers and the number of mixed steps."""
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
