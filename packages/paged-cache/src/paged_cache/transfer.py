"""A sequence's pages on their way to another cache: computed here, continued there."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import Int32

from paged_cache.archive import Archive
from paged_cache.cache import PagedAttentionCache
from paged_cache.device import apply_moves
from paged_cache.host import HostPages
from paged_cache.manager import Media, PageManager
from paged_cache.page_arrays import arrays_from_pages, check_fits, layout_of, pages_from_arrays

KIND = "sequence"
PLACES = "places"
TOKEN_IDS = "token_ids"


@dataclasses.dataclass(frozen=True)
class SequencePages:
    """What a sequence's pages hold, for a cache of the same layout and the same groups of layers."""

    token_ids: Int32[np.ndarray, " tokens"]
    """The tokens whose keys and values these are."""
    cross_tokens: int
    """Tokens that groups of cross-attention see."""
    places: Int32[np.ndarray, "n 2"]
    """For each page, the group of layers and the index in that group's page table."""
    groups: list[dict[str, Any]]
    """The fields of each `LayerGroup`."""
    layout: dict[str, Any]
    """Page size, heads, number of views, and the fields of `RowLayout`."""
    arrays: dict[str, np.ndarray]
    """The pages: `view.0.data` `[n, kv_heads, page_size, storage_lanes]`, `view.0.scales` if they have any, ..."""

    def to_bytes(self) -> bytes:
        """A safetensors file with checksums, to send."""
        return self._archive().to_bytes()

    def save(self, path: str | Path) -> None:
        """Write that file; at `path` there is never half of it."""
        self._archive().save(path)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """What `to_bytes` gave.

        Raises:
            ValueError: it is something else, damaged, or of an unknown version; says which.
        """
        return cls._from(Archive.from_bytes(data, KIND))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """What `save` wrote.

        Raises:
            ValueError: it is something else, damaged, or of an unknown version; says which.
        """
        return cls._from(Archive.load(path, KIND))

    def _archive(self) -> Archive:
        facts = {"cross_tokens": self.cross_tokens, "groups": self.groups, "layout": self.layout}
        return Archive(KIND, facts, {TOKEN_IDS: self.token_ids, PLACES: self.places, **self.arrays})

    @classmethod
    def _from(cls, archive: Archive) -> Self:
        arrays = dict(archive.arrays)
        return cls(token_ids=arrays.pop(TOKEN_IDS), places=arrays.pop(PLACES), arrays=arrays, **archive.facts)


def export_sequence(
    cache: PagedAttentionCache, manager: PageManager, seq: int, *, data_group: int = 0
) -> SequencePages:
    """What the pages of a sequence hold, as far as it is computed; the sequence stays as it is.

    Call it when all of `manager.take_moves` has been applied to the cache.

    Args:
        cache: the pages of all layers.
        manager: whose sequence it is.
        seq: the sequence.
        data_group: with a `data_axis`, the data group whose manager it is.

    Raises:
        ValueError: nothing of the sequence is computed, its tokens are not known, or it is swapped out.
        NotImplementedError: the layers' pages are not all of one shape, or other processes have parts of them.
    """
    (computed,), (cross_tokens,) = manager.computed(seq).tolist(), manager.cross_tokens(seq).tolist()
    token_ids = manager.token_ids(seq)[:computed]
    if not computed or token_ids.min() < 0:
        raise ValueError(
            f"sequence {seq} has {computed} computed tokens, {(token_ids < 0).sum()} of them not known; export it after "
            "commit, and tell extend or commit the token ids"
        )
    tables = manager.tables(seq)[:, 0]
    places = np.argwhere(tables[:, :])
    ...
