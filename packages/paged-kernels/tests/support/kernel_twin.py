"""A kernel in numpy, cut as the real ones are, one overridable step at a time, so that each step can be broken."""

from collections.abc import Iterator

import numpy as np

from paged_kernels import AttentionSpec, HeadParams, KVPages, RaggedBatch


class Twin:
    """Walks each sequence's pages in blocks, with an online softmax over all its rows and one query head at a time."""

    block_pages = 2

    def __call__(
        self, q, pages: KVPages, batch: RaggedBatch, spec: AttentionSpec, heads: HeadParams
    ) -> tuple[np.ndarray, np.ndarray]:
        """Output and log-sum-exp, as `paged_attention`."""
        self.spec, self.heads, self.layout, self.page_size = spec, heads, pages.layout, pages.page_size
        self.q, self.q_per_kv = np.asarray(q, np.float32), q.shape[1] // pages.num_kv_heads
        self.read_pages(pages)
        self.table, self.kv_lens, self.starts = map(np.asarray, (batch.page_table, batch.kv_lens, batch.cu_q_lens))
        self.q_starts, self.tree = (None if x is None else np.asarray(x) for x in (batch.q_starts, batch.tree_mask))
        out = np.zeros((*q.shape[:2], pages.v_head_dim), np.float32)
        lse = np.full(q.shape[:2], -np.inf, np.float32)
        for seq in range(int(batch.num_seqs)):
            rows = slice(self.starts[seq], self.starts[seq + 1])
            if self.kv_lens[seq] == 0 or rows.start == rows.stop:
                continue
            for head in range(q.shape[1]):
                out[rows, head], lse[rows, head] = self.attend(seq, rows, head)
        return out, lse

    def read_pages(self, pages: KVPages) -> None:
        """Sets `k`, `v` `[pages, kv_heads, page_size, dim]` as they are stored, and the scales of their slots."""
        lanes = np.asarray(pages.data)
        if self.layout.dtype == "int4":
            lanes = np.concatenate(self.halves((lanes << 4) >> 4, lanes >> 4), axis=-1)
        lanes = lanes.astype(np.float32)
        v_start = self.v_start()
        self.k, self.v = lanes[..., : self.layout.k_dim], lanes[..., v_start : v_start + self.layout.v_dim]
        if pages.scales is None:
            self.scales = np.ones((2, *lanes.shape[:3]), np.float32)
        else:
            kinds = np.arange(self.layout.scales_per_entry)[[0, -1]]  # K's and V's; a latent row has one scale for both
            slots = kinds[:, None] * self.page_size + np.arange(self.page_size)
            self.scales = np.asarray(pages.scales)[:, :, 0, slots].transpose(2, 0, 1, 3)

    def attend(self, seq: int, rows: slice, head: int) -> tuple[np.ndarray, np.ndarray]:
        q = self.q[rows, head]
        t = self.first_position(seq, len(q)) + np.arange(len(q))[:, None]  # position of each row
        top, total, acc = self.before_keys(head, len(q))
        for start, stop in self.blocks(*self.page_range(seq, t)):
            p, k, v = self.fetch(seq, self.kv_head(head), start, stop)
            visible = np.broadcast_to(self.visible(t, p[None], seq, rows), (len(q), len(p)))
            s = self.logits(q, np.where(visible.any(0)[:, None], k, 0), self.bias(t, p[None], head))
            s = np.where(visible, s, -np.inf)
            new_top = np.maximum(top, s.max(axis=1, initial=-np.inf))
            shift = np.where(np.isneginf(new_top), 0, new_top)
            weights, keep = np.exp(s - shift[:, None]), np.exp(top - shift)
            total = self.rescale_total(total, keep) + self.sum_of_block(weights, shift, head)
            acc = self.rescale_values(acc, keep) + weights @ np.where(visible.any(0)[:, None], v, 0)
            top = new_top
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(total[:, None] > 0, acc / total[:, None], 0), self.lse(top, total)

    def before_keys(self, head: int, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Each row's maximum, sum and values before any key."""
        sink = self.sink(head)
        total = np.full(rows, 0 if np.isneginf(sink) else 1, np.float32)
        return np.full(rows, sink, np.float32), total, np.zeros((rows, self.layout.v_dim), np.float32)

    def halves(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The two halves of int4 lanes, from the nibbles."""
        return low, high

    def v_start(self) -> int:
        return self.layout.v_start

    def kv_head(self, head: int) -> int:
        return head // self.q_per_kv

    def first_position(self, seq: int, rows: int) -> int:
        return self.kv_lens[seq] - rows if self.q_starts is None else self.q_starts[seq]

    def page_range(self, seq: int, t: np.ndarray) -> tuple[int, int]:
        """Indices in the page table of the first page that a row may see, and after the last."""
        window = self.spec.sliding_window
        first = 0 if window is None else max(0, t[0, 0] - window + 1) // self.page_size
        return first, -(-int(self.kv_lens[seq]) // self.page_size)

    def blocks(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        for start in range(first, end, self.block_pages):
            yield start, min(start + self.block_pages, end)

    def fetch(self, seq: int, head: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions, keys and values of the slots of these pages."""
        ids = np.array([self.page_id(seq, index) for index in range(start, stop)])
        k = self.k[ids, head] * self.k_scales(ids, head)[..., None]
        v = self.v[ids, head] * self.v_scales(ids, head)[..., None]
        return self.positions(start, stop), np.concatenate(k), np.concatenate(v)

    def positions(self, start: int, stop: int) -> np.ndarray:
        return np.arange(start * self.page_size, stop * self.page_size)

    def page_id(self, seq: int, index: int) -> int:
        return self.table[seq, index]

    def k_scales(self, ids: np.ndarray, head: int) -> np.ndarray:
        return self.scales[0, ids, head]

    def v_scales(self, ids: np.ndarray, head: int) -> np.ndarray:
        return self.scales[1, ids, head]

    def visible(self, t, p, seq, rows):
        in_order = self.in_causal(t, p) if self.tree is None else self.in_tree(self.tree[rows], p - t[0, 0])
        return (p < self.kv_end(seq)) & in_order & self.in_window(t, p)

    def kv_end(self, seq: int) -> int:
        return self.kv_lens[seq]

    def in_causal(self, t, p):
        return (p <= t) | (not self.spec.causal)

    def in_tree(self, words: np.ndarray, new: np.ndarray):
        """Whether each row, of mask `words [rows, words]`, sees its sequence's new tokens `new [1, keys]`."""
        word = words[:, np.clip(new[0] // 32, 0, words.shape[1] - 1)]
        return (new < 0) | ((new < 32 * words.shape[1]) & (word >> (new % 32) & 1 == 1))

    def in_window(self, t, p):
        return True if self.spec.sliding_window is None else t - p < self.spec.sliding_window

    def logits(self, q, k, bias):
        return self.cap(self.scale(q.shape[1]) * (q @ k.T)) + bias

    def scale(self, head_dim):
        return self.spec.resolved_scale(head_dim)

    def cap(self, s):
        return s if self.spec.soft_cap is None else self.spec.soft_cap * np.tanh(s / self.spec.soft_cap)

    def bias(self, t, p, head):
        return -self.slope(head) * np.abs(t - p)

    def slope(self, head: int) -> float:
        return 0.0 if self.heads.alibi_slopes is None else float(self.heads.alibi_slopes[head])

    def sink(self, head: int) -> float:
        return -np.inf if self.heads.sinks is None else float(self.heads.sinks[head])

    def sum_of_block(self, weights, shift, head):
        return weights.sum(axis=1)

    def rescale_total(self, total, keep):
        return total * keep

    def rescale_values(self, acc, keep):
        return acc * keep[:, None]

    def lse(self, top, total):
        return top + np.log(total)
