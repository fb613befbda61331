"""Steps over pages with known contents, and their attention computed densely in float64: no pages, no jax.

Whatever must not be read is NaN: the null page, pages nobody owns, and slots past a sequence's end.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from paged_cache import PagedAttentionCacheView
from paged_kernels import HeadParams, KVPages, RaggedBatch, pack_tree_masks

TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


def attention(q, k, v, *, scale=None, causal=True, sliding_window=None, soft_cap=None, sinks=None, alibi_slopes=None):
    """The last `len(q)` tokens of one sequence over all of it: `[n, q_heads, head_dim]` in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    n, heads, head_dim = q.shape
    k, v = (np.repeat(x, heads // x.shape[1], axis=1) for x in (k, v))
    s = np.einsum("thd,phd->htp", q, k) * (head_dim**-0.5 if scale is None else scale)
    if soft_cap is not None:
        s = soft_cap * np.tanh(s / soft_cap)
    t, p = np.arange(len(k) - n, len(k))[:, None], np.arange(len(k))[None]
    if alibi_slopes is not None:
        s -= np.asarray(alibi_slopes)[:, None, None] * np.abs(t - p)
    hidden = (causal & (p > t)) | (t - p >= (len(k) if sliding_window is None else sliding_window))
    s = np.where(hidden, -np.inf, s)
    weights = np.exp(s)
    beside = 0 if sinks is None else np.exp(np.asarray(sinks, np.float64))[:, None, None]
    return np.einsum("htp,phd->thd", weights / (weights.sum(-1, keepdims=True) + beside), v)


@dataclasses.dataclass
class Step:
    """One step's sequences: their keys and values so far, their new rows, and where their pages are."""

    kv_lens: tuple[int, ...]
    q_lens: tuple[int, ...]
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    page_size: int = 8
    num_pages: int = 24
    seed: int = 0

    def __post_init__(self):
        rng = np.random.default_rng(self.seed)
        self.k, self.v = ([self._draw(rng, n, self.kv_heads) for n in self.kv_lens] for _ in "kv")
        self.q = [self._draw(rng, n, self.q_heads) for n in self.q_lens]
        free = list(rng.permutation(np.arange(1, self.num_pages)))
        self.page_lists = [[int(free.pop()) for _ in range(-(-n // self.page_size))] for n in self.kv_lens]

    def _draw(self, rng, n, heads):
        return rng.standard_normal((n, heads, self.head_dim)).astype(np.float32)

    @property
    def batch(self):
        return RaggedBatch.from_lists(self.page_lists, list(self.kv_lens), list(self.q_lens))

    def pages(self, *, with_new):
        """NaN but for the tokens before this step's, or with this step's as well."""
        k = np.full((self.kv_heads, self.num_pages, self.page_size, self.head_dim), np.nan, np.float32)
        v = k.copy()
        for i, pages in enumerate(self.page_lists):
            for p in range(self.kv_lens[i] - (0 if with_new else self.q_lens[i])):
                at = (slice(None), pages[p // self.page_size], p % self.page_size)
                k[at], v[at] = self.k[i][p], self.v[i][p]
        return KVPages.from_kv(jnp.asarray(k), jnp.asarray(v))

    def heads(self):
        """A sink and an ALiBi slope of each query head."""
        sinks, slopes = jnp.linspace(-1, 2, self.q_heads), jnp.linspace(0.01, 0.3, self.q_heads)
        return HeadParams(sinks=sinks, alibi_slopes=slopes)

    def in_a_tree(self, tokens):
        """The batch in which each new token sees itself, the first, and every other one between them."""
        masks = [np.tri(n) * ((np.arange(n)[:, None] - np.arange(n)) % 2 == 0) for n in self.q_lens]
        for mask in masks:
            mask[:, 0] = 1
        packed = jnp.asarray(pack_tree_masks(masks, self.q_lens, tokens=tokens))
        return dataclasses.replace(self.batch, max_q_len=max(self.q_lens), tree_mask=packed)

    def view(self, *, with_new=False):
        return PagedAttentionCacheView(self.pages(with_new=with_new))

    def rows(self, tokens=None):
        """q, k and v of this step's tokens, NaN in padding rows up to `tokens`."""
        new = zip(self.k, self.v, self.q_lens, strict=True)
        parts = [(k[len(k) - n :], v[len(v) - n :]) for k, v, n in new]
        return tuple(self._pad(x, tokens) for x in (self.q, [k for k, _ in parts], [v for _, v in parts]))

    def expected(self, tokens=None, **spec):
        """The output, zero in padding rows."""
        each = [attention(q, k, v, **spec) for q, k, v in zip(self.q, self.k, self.v, strict=True) if len(k)]
        return self._pad(each, tokens, fill=0.0)

    def _pad(self, parts, tokens, fill=np.nan):
        rows = np.concatenate(parts)
        out = np.full((tokens or len(rows), *rows.shape[1:]), fill, np.float32)
        out[: len(rows)] = rows
        return jnp.asarray(out)
