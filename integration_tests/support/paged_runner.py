"""Runs a model step by step on the paged cache, without the engine. The test decides what each step computes."""

import jax.numpy as jnp
import numpy as np

from paged_cache import BatchShapes, CacheConfig, KVShape, PagedAttentionCache, PageManager

PAGE_SIZE = 16


class PagedRunner:
    """Keeps the pages and the length of each sequence, and calls the model without `jax.jit`.

    So one layer is compiled per shape, not thirty. The engine's tests compile whole steps.
    """

    def __init__(self, model, *, mesh=None, tokens=(96,), max_seqs=8, pages_per_seq=8, kv_dtype=jnp.float32):
        self._model = model
        self._shapes = BatchShapes(tokens=tokens, max_seqs=max_seqs, pages_per_seq=pages_per_seq)
        sizes = {"max_seqs": max_seqs, "max_sequence_length": pages_per_seq * PAGE_SIZE}
        self._manager = PageManager(1 + max_seqs * pages_per_seq, PAGE_SIZE, **sizes, prefix_reuse=False)
        self._seqs: dict[int, int] = {}
        shape = KVShape(num_kv_heads=model.config.num_key_value_heads, head_dim=model.config.head_dim)
        config = CacheConfig(
            views=(shape,) * model.config.num_hidden_layers,
            num_pages=self._manager.num_pages,
            page_size=PAGE_SIZE,
            dtype=kv_dtype,
            **sizes,
        )
        self._cache = PagedAttentionCache.init_cache(mesh, None, config, None)

    def step(self, work: dict[int, list[int]]) -> dict[int, np.ndarray]:
        """Feed each sequence its next tokens. Returns the logits `[tokens, vocab]` of all of them, by sequence."""
        q_lens = [len(tokens) for tokens in work.values()]
        logits = self._compute(work, lambda step: jnp.arange(len(step.positions), dtype=jnp.int32))
        return dict(zip(work, np.split(logits[: sum(q_lens)], np.cumsum(q_lens)[:-1]), strict=True))

    def greedy_step(self, work: dict[int, list[int]]) -> dict[int, int]:
        """Feed each sequence its next tokens. Returns the likeliest token after the last of them, by sequence."""
        logits = self._compute(work, lambda step: step.last_rows)
        return dict(zip(work, logits.argmax(axis=1).tolist(), strict=False))

    def _compute(self, work: dict[int, list[int]], rows) -> np.ndarray:
        seqs = [self._extended(sequence, tokens) for sequence, tokens in work.items()]
        counts = np.array([len(tokens) for tokens in work.values()], np.int32)
        ids = np.concatenate(list(work.values())).astype(np.int32)
        step = self._shapes.pack_seqs(self._manager, seqs, ids, q_lens=counts)
        logits, self._cache = self._model(step.token_ids, step.positions, self._cache, step.batch, rows(step))
        self._manager.commit(seqs, counts)
        return np.asarray(logits)

    def feed(self, tokens: list[int], chunks: list[int]) -> np.ndarray:
        """Feed one new sequence in chunks of these sizes. Returns the logits of all its tokens."""
        assert sum(chunks) == len(tokens)
        sequence, ends = len(self._seqs), np.cumsum(chunks).tolist()
        parts = [tokens[end - size : end] for end, size in zip(ends, chunks, strict=True)]
        return np.concatenate([self.step({sequence: part})[sequence] for part in parts])

    def _extended(self, sequence: int, tokens: list[int]) -> int:
        """The page manager's id of a sequence that has these tokens too now."""
        if sequence in self._seqs:
            self._manager.extend(self._seqs[sequence], len(tokens), tokens)
        else:
            self._seqs[sequence] = self._manager.admit(tokens)
        return self._seqs[sequence]


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
