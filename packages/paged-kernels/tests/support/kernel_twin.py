"""A kernel in numpy, cut as the real ones are, one overridable step at a time, so that each step can be broken."""

import numpy as np

from paged_kernels import AttentionSpec, KVPages, RaggedBatch


class Twin:
    """Walks each sequence's pages in blocks, with an online softmax over all its rows and one KV head at a time."""

    block_pages = 2

    def __call__(self, q, pages: KVPages, batch: RaggedBatch, spec: AttentionSpec) -> tuple[np.ndarray, np.ndarray]:
        """Output and log-sum-exp, as `paged_attention`."""
        self.q, self.k, self.v = (np.asarray(x, np.float32) for x in (q, pages.k, pages.v))
        self.table, self.kv_lens, self.starts = map(np.asarray, (batch.page_table, batch.kv_lens, batch.cu_q_lens))
        self.spec, self.page_size, self.group = spec, pages.page_size, q.shape[1] // pages.num_kv_heads
        out, lse = np.zeros_like(self.q), np.full(self.q.shape[:2], -np.inf, np.float32)
        for seq in range(int(batch.num_seqs)):
            rows = slice(self.starts[seq], self.starts[seq + 1])
            if self.kv_lens[seq] == 0 or rows.start == rows.stop:
                continue
            for head in range(q.shape[1]):
                out[rows, head], lse[rows, head] = self.attend(seq, self.q[rows, head], self.kv_head(head))
        return out, lse

    def attend(self, seq: int, q: np.ndarray, head: int) -> tuple[np.ndarray, np.ndarray]:
        t = np.arange(self.kv_lens[seq] - len(q), self.kv_lens[seq])  # position of each row
        top, total = np.full(len(q), -np.inf, np.float32), np.zeros(len(q), np.float32)
        acc = np.zeros_like(q)
        first, end = self.page_range(seq, t)
        for index in range(first, end, self.block_pages):
            p, k, v = self.fetch(seq, head, index, min(index + self.block_pages, end))
            visible = self.visible(t[:, None], p[None], self.kv_lens[seq])
            s = np.where(visible, self.logits(q, np.where(visible.any(0)[:, None], k, 0)), -np.inf)
            new_top = np.maximum(top, s.max(axis=1))
            shift = np.where(np.isneginf(new_top), 0, new_top)
            weights, keep = np.exp(s - shift[:, None]), np.exp(top - shift)
            total = self.rescale_total(total, keep) + weights.sum(axis=1)
            acc = self.rescale_values(acc, keep) + weights @ np.where(visible.any(0)[:, None], v, 0)
            top = new_top
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(total[:, None] > 0, acc / total[:, None], 0), self.lse(top, total)

    def kv_head(self, head: int) -> int:
        return head // self.group

    def page_range(self, seq: int, t: np.ndarray) -> tuple[int, int]:
        """Indices in the page table of the first page that a row may see, and after the last."""
        first = 0 if self.spec.sliding_window is None else max(0, t[0] - self.spec.sliding_window + 1) // self.page_size
        return first, -(-int(self.kv_lens[seq]) // self.page_size)

    def fetch(self, seq: int, head: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions, keys and values of the slots of these pages."""
        ids = [self.page_id(seq, index) for index in range(start, stop)]
        positions = np.arange(start * self.page_size, stop * self.page_size)
        return positions, np.concatenate(self.k[head, ids]), np.concatenate(self.v[head, ids])

    def page_id(self, seq: int, index: int) -> int:
        return self.table[seq, index]

    def visible(self, t, p, kv_len):
        return (p < kv_len) & self.in_causal(t, p) & self.in_window(t, p)

    def in_causal(self, t, p):
        return (p <= t) | (not self.spec.causal)

    def in_window(self, t, p):
        return True if self.spec.sliding_window is None else t - p < self.spec.sliding_window

    def logits(self, q, k):
        return self.cap(self.scale(q.shape[1]) * (q @ k.T))

    def scale(self, head_dim):
        return self.spec.resolved_scale(head_dim)

    def cap(self, s):
        return s if self.spec.soft_cap is None else self.spec.soft_cap * np.tanh(s / self.spec.soft_cap)

    def rescale_total(self, total, keep):
        return total * keep

    def rescale_values(self, acc, keep):
        return acc * keep[:, None]

    def lse(self, top, total):
        return top + np.log(total)
