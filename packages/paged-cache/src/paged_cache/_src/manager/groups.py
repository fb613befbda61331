"""Layer groups: layers that see the same keys share a page table."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, TypeVar

import numpy as np

Kind = Literal["full", "window", "chunked", "cross"]
Count = TypeVar("Count", int, np.ndarray)


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
    """Indices of the model's layers. The group's `i`-th layer uses the cache's view `i`."""

    def __post_init__(self) -> None:
        if self.kind not in ("full", "window", "chunked", "cross"):
            raise ValueError(f"kind={self.kind!r} must be 'full', 'window', 'chunked' or 'cross'")
        if (self.kind in ("window", "chunked")) != (self.tokens >= 1) or self.tokens < 0:
            needs = "at least 1" if self.kind in ("window", "chunked") else "0"
            raise ValueError(f"tokens={self.tokens} must be {needs} for kind={self.kind!r}")

    @classmethod
    def full(cls, layers: Sequence[int] = ()) -> "LayerGroup":
        """Layers that see all keys up to the query's position."""
        return cls(kind="full", layers=tuple(layers))

    @classmethod
    def window(cls, tokens: int, layers: Sequence[int] = ()) -> "LayerGroup":
        """Layers that see the last `tokens` keys, including the query's own (sliding window)."""
        return cls(kind="window", tokens=tokens, layers=tuple(layers))

    @classmethod
    def chunked(cls, tokens: int, layers: Sequence[int] = ()) -> "LayerGroup":
        """Layers that see only keys in the query's own chunk of `tokens` positions (chunked attention)."""
        return cls(kind="chunked", tokens=tokens, layers=tuple(layers))

    @classmethod
    def cross(cls, layers: Sequence[int] = ()) -> "LayerGroup":
        """Layers that see the keys of something else, such as an encoder's text or a picture (cross-attention)."""
        return cls(kind="cross", layers=tuple(layers))

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
