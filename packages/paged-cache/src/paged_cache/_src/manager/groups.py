"""Layers that see the same keys, and so share a page table."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, TypeVar

import numpy as np

Kind = Literal["full", "window", "chunked", "cross"]
Count = TypeVar("Count", int, np.ndarray)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """Layers with one page table a sequence. What a query at position `t` sees depends on their kind.

        full     | keys 0 .. t
        window   | keys max(0, t - tokens + 1) .. t
        chunked  | keys t // tokens * tokens .. t
        cross    | the keys of another text or picture, as many as `admit` was told, and none of its own

    All groups of a cache take their pages from one pool: a page belongs to one group at a time.

    Raises:
        ValueError: window and chunked need at least one token; full and cross take none.
    """

    kind: Kind
    """What the layers see."""
    tokens: int = 0
    """The window or the chunk, in tokens; 0 for the other kinds."""
    layers: tuple[int, ...] = ()
    """The model's layers, by index; the group's `i`-th layer keeps its pages in the cache's view `i`."""

    def __post_init__(self) -> None:
        if self.kind not in ("full", "window", "chunked", "cross"):
            raise ValueError(f"kind={self.kind!r} must be 'full', 'window', 'chunked' or 'cross'")
        if (self.kind in ("window", "chunked")) != (self.tokens >= 1) or self.tokens < 0:
            needs = "at least 1" if self.kind in ("window", "chunked") else "0"
            raise ValueError(f"tokens={self.tokens} must be {needs} for kind={self.kind!r}")

    @classmethod
    def full(cls, layers: Sequence[int] = ()) -> "LayerGroup":
        """Layers that see every key before them."""
        return cls(kind="full", layers=tuple(layers))

    @classmethod
    def window(cls, tokens: int, layers: Sequence[int] = ()) -> "LayerGroup":
        """Layers that see the newest `tokens` keys, their own included."""
        return cls(kind="window", tokens=tokens, layers=tuple(layers))

    @classmethod
    def chunked(cls, tokens: int, layers: Sequence[int] = ()) -> "LayerGroup":
        """Layers that see the keys of their own chunk of `tokens` (chunked-local attention)."""
        return cls(kind="chunked", tokens=tokens, layers=tuple(layers))

    @classmethod
    def cross(cls, layers: Sequence[int] = ()) -> "LayerGroup":
        """Layers that see the keys of something else: an encoder's text, a picture."""
        return cls(kind="cross", layers=tuple(layers))

    @property
    def is_self_attention(self) -> bool:
        """Whether each token of the sequence adds a key."""
        return self.kind != "cross"

    @property
    def is_windowed(self) -> bool:
        """Whether keys go out of sight as the sequence grows."""
        return self.kind in ("window", "chunked")

    def first_needed(self, computed: Count) -> Count:
        """Position of the first key that a query at `computed` or later can see; what lies before it can be returned.

        >>> [group.first_needed(10) for group in (LayerGroup.window(4), LayerGroup.chunked(4), LayerGroup.full())]
        [7, 8, 0]
        """
        if self.kind == "window":
            first = computed - self.tokens + 1
            return first * (first > 0)
        if self.kind == "chunked":
            return computed // self.tokens * self.tokens
        return computed * 0
