"""Layer groups: layers that see the same keys share a page table; and what one layer stores for a token."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, TypeVar

import numpy as np

Kind = Literal["full", "window", "chunked", "cross"]
Count = TypeVar("Count", int, np.ndarray)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVShape:
    """What one layer stores for one token: `num_kv_heads` entries, each a key of `head_dim` numbers and a value.

    >>> KVShape(num_kv_heads=8, head_dim=128)
    KVShape(num_kv_heads=8, head_dim=128, v_head_dim=None, latent=False, dtype=None)

    Raises:
        ValueError: a size is no whole number of at least 1, or a latent value is longer than its key.
    """

    num_kv_heads: int
    """Number of KV heads; 1 for latent entries."""
    head_dim: int
    """Numbers of a key; of a latent entry, its rank and its rotary part together."""
    v_head_dim: int | None = None
    """Numbers of a value; `None` means `head_dim`, which is turned into `None`."""
    latent: bool = False
    """True if a value is the start of its key, and stored once (multi-head latent attention, arXiv 2405.04434)."""
    dtype: str | None = None
    """Type of the stored numbers, by name; `None` means the cache's."""

    def __post_init__(self) -> None:
        for name in ("num_kv_heads", "head_dim", "v_head_dim"):
            size = getattr(self, name)
            if name == "v_head_dim" and size is None:
                continue
            if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
                raise ValueError(f"{name}={size!r} must be a whole number of at least 1")
        if self.latent and (self.v_head_dim or 0) > self.head_dim:
            raise ValueError(
                f"v_head_dim={self.v_head_dim} must be at most head_dim={self.head_dim}: a latent value is the start "
                "of its key"
            )
        if self.v_head_dim == self.head_dim:  # one spelling, so that equal shapes compare equal
            object.__setattr__(self, "v_head_dim", None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """Layers that share one page table per sequence. `kind` decides which keys a query at position `t` sees.

        full     | keys 0 .. t
        window   | keys max(0, t - tokens + 1) .. t
        chunked  | keys t // tokens * tokens .. t
        cross    | `cross_tokens` keys of something else (an encoder's text, a picture), and none of its own

    All groups of a cache share one pool. A page in use belongs to one group.

    Raises:
        ValueError: `tokens` is below 1 for window or chunked, or not 0 for full or cross.
    """

    kind: Kind
    """Which keys the layers see."""
    tokens: int = 0
    """Size of the window or of the attention chunk, in tokens; 0 for the other kinds."""
    layers: tuple[int, ...] = ()
    """Indices of the model's layers. The group's `i`-th layer uses view `i` of those of its shape."""
    kv: KVShape | None = None
    """What each of these layers stores for one token; `None` where only page tables matter."""

    def __post_init__(self) -> None:
        if self.kind not in ("full", "window", "chunked", "cross"):
            raise ValueError(f"kind={self.kind!r} must be 'full', 'window', 'chunked' or 'cross'")
        if (self.kind in ("window", "chunked")) != (self.tokens >= 1) or self.tokens < 0:
            needs = "at least 1" if self.kind in ("window", "chunked") else "0"
            raise ValueError(f"tokens={self.tokens} must be {needs} for kind={self.kind!r}")

    @classmethod
    def full(cls, layers: Sequence[int] = (), kv: KVShape | None = None) -> "LayerGroup":
        """Layers that see all keys up to the query's position."""
        return cls(kind="full", layers=tuple(layers), kv=kv)

    @classmethod
    def window(cls, tokens: int, layers: Sequence[int] = (), kv: KVShape | None = None) -> "LayerGroup":
        """Layers that see the last `tokens` keys, including the query's own (sliding window)."""
        return cls(kind="window", tokens=tokens, layers=tuple(layers), kv=kv)

    @classmethod
    def chunked(cls, tokens: int, layers: Sequence[int] = (), kv: KVShape | None = None) -> "LayerGroup":
        """Layers that see only keys in the query's own chunk of `tokens` positions (chunked attention)."""
        return cls(kind="chunked", tokens=tokens, layers=tuple(layers), kv=kv)

    @classmethod
    def cross(cls, layers: Sequence[int] = (), kv: KVShape | None = None) -> "LayerGroup":
        """Layers that see the keys of something else, such as an encoder's text or a picture (cross-attention)."""
        return cls(kind="cross", layers=tuple(layers), kv=kv)

    @property
    def is_self_attention(self) -> bool:
        """True if each token of the sequence adds a key: all kinds except cross."""
        return self.kind != "cross"

    @property
    def is_windowed(self) -> bool:
        """True if later queries no longer see early keys: window and chunked."""
        return self.kind in ("window", "chunked")

    def first_needed(self, computed: Count) -> Count:
        """Position of the first key that a query at `computed` or later sees. Pages before it can be released.

        >>> [group.first_needed(10) for group in (LayerGroup.window(4), LayerGroup.chunked(4), LayerGroup.full())]
        [7, 8, 0]
        """
        if self.kind == "window":
            first = computed - self.tokens + 1
            return first * (first > 0)
        if self.kind == "chunked":
            return computed // self.tokens * self.tokens
        return computed * 0

    def most_pages(self, length: Count, new_tokens: int, page_size: int) -> Count:
        """The most pages that a sequence of up to `length` tokens holds at once, given at most `new_tokens` a step.

        With `n` tokens computed and `q <= new_tokens` being computed, pages hold the positions
        `first_needed(n) .. n + q - 1`:

            full      from 0                                           all `length` of them
            window    from n - tokens + 1, so anywhere in a page       tokens - 1 + q positions
            chunked   from a multiple of `tokens`                      tokens - 1 + q positions at most

        A run of `span` positions that starts at a multiple of `step` starts at most `page_size - gcd(step, page_size)`
        after the start of a page, so it touches at most

            min(ceil(length / page_size), ceil((page_size - gcd(step, page_size) + span) / page_size))

        For cross-attention `length` counts the tokens that it sees.

        >>> LayerGroup.window(128).most_pages(4096, new_tokens=1, page_size=16)
        9
        """
        all_pages = -(-length // page_size)
        if not self.is_windowed:
            return all_pages
        step = 1 if self.kind == "window" else self.tokens
        span = self.tokens - 1 + new_tokens
        most = -(-(page_size - math.gcd(step, page_size) + span) // page_size)
        beyond = all_pages - most
        return all_pages - beyond * (beyond > 0)
