"""A sequence's pages on their way to another cache: computed here, continued there."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import Int32

from paged_cache._src.cache.cache import PagedAttentionCache
from paged_cache._src.manager import KVShape, LayerGroup, Media, PageManager, Prompt
from paged_cache._src.transfer.apply_moves import apply_moves_by_replica, moves_of_one
from paged_cache._src.transfer.archive import Archive
from paged_cache._src.transfer.host_pages import HostPages
from paged_cache._src.transfer.page_arrays import (
    arrays_from_pages,
    check_fits,
    check_host,
    check_pool,
    layout_of,
    pages_from_arrays,
)

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
    groups: tuple[LayerGroup, ...]
    """The groups of layers that have page tables."""
    layout: dict[str, Any]
    """Page size, heads, number of views, and the fields of `KVLayout`."""
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
        groups = [dataclasses.asdict(group) for group in self.groups]
        facts = {"cross_tokens": self.cross_tokens, "groups": groups, "layout": self.layout}
        return Archive(KIND, facts, {TOKEN_IDS: self.token_ids, PLACES: self.places, **self.arrays})

    @classmethod
    def _from(cls, archive: Archive) -> Self:
        arrays, facts = dict(archive.arrays), archive.facts
        groups = tuple(map(_group, facts["groups"]))
        return cls(
            token_ids=arrays.pop(TOKEN_IDS),
            cross_tokens=facts["cross_tokens"],
            places=arrays.pop(PLACES),
            groups=groups,
            layout=facts["layout"],
            arrays=arrays,
        )


def _group(facts: dict[str, Any]) -> LayerGroup:
    """A group of layers, from what `dataclasses.asdict` and JSON made of it."""
    kv = None if facts["kv"] is None else KVShape(**facts["kv"])
    return LayerGroup(**facts | {"layers": tuple(facts["layers"]), "kv": kv})


def export_sequence(cache: PagedAttentionCache, manager: PageManager, seq: int, *, replica: int = 0) -> SequencePages:
    """What the pages of a sequence hold, as far as it is computed; the sequence stays as it is.

    Call it when all of `manager.take_moves` has been applied to the cache.

    Args:
        cache: the pages of all layers.
        manager: whose sequence it is.
        seq: the sequence.
        replica: with a `data_axis`, the replica whose manager it is.

    Raises:
        ValueError: nothing of the sequence is computed, its tokens are not known, or it is swapped out.
        NotImplementedError: the layers' pages are not all of one shape, or other processes have parts of them.
    """
    check_pool(cache, manager.num_pages, replica)
    (computed,), (cross_tokens,) = manager.computed(seq).tolist(), manager.cross_tokens(seq).tolist()
    token_ids = manager.token_ids(seq)[:computed]
    if not computed or token_ids.min() < 0:
        raise ValueError(
            f"sequence {seq} has {computed} computed tokens, {(token_ids < 0).sum()} of them not known; export it "
            "after commit, and tell extend or commit the token ids"
        )
    tables = manager.page_tables(seq)[:, 0]
    tokens = np.array([computed if group.is_self_attention else cross_tokens for group in manager.groups])
    within = np.arange(tables.shape[1]) * manager.page_size < tokens[:, None]
    places = np.argwhere((tables > 0) & within).astype(np.int32)
    return SequencePages(
        token_ids=token_ids,
        cross_tokens=cross_tokens,
        places=places,
        groups=manager.groups,
        layout=layout_of(cache),
        arrays=arrays_from_pages(cache, tables[tuple(places.T)], replica),
    )


def import_sequence(
    cache: PagedAttentionCache,
    manager: PageManager,
    pages: SequencePages,
    *,
    namespace: str = "",
    adapter: str = "",
    media: Sequence[Media] = (),
    host: HostPages | None = None,
    replica: int = 0,
) -> tuple[PagedAttentionCache, int]:
    """The cache, donated, with these pages in it, and the new sequence whose they are, all of it computed.

    Pages that already hold its prefix are shared and not written again. Whose sequence it is the caller says, not the
    pages: they are checked for damage, and otherwise believed. Applies `manager.take_moves` first.

    Args:
        cache: the pages of all layers.
        manager: gets the sequence.
        pages: what `export_sequence` gave.
        namespace: as for `Prompt`.
        adapter: as for `Prompt`.
        media: as for `Prompt`.
        host: as for `apply_moves`, for moves that are waiting; needed if the manager has host pages.
        replica: with a `data_axis`, the replica whose manager it is.

    Raises:
        ValueError: the pages do not fit the cache or the manager; nothing is taken.
        OutOfPages: not enough pages are free; nothing is taken.
        NotImplementedError: the layers' pages are not all of one shape.
    """
    check_pool(cache, manager.num_pages, replica)
    check_host(manager, host)
    check_fits(cache, pages.layout, pages.arrays, len(pages.places))
    if (manager.groups, manager.page_size) != (pages.groups, pages.layout["page_size"]):
        raise ValueError(
            f"the pages are of {pages.layout['page_size']} tokens and of {pages.groups}, but the manager has "
            f"page_size={manager.page_size} and groups={manager.groups}; import into a manager of the same"
        )
    prompt = Prompt(pages.token_ids, namespace=namespace, adapter=adapter, media=media)
    seq = manager.admit(prompt, cross_tokens=pages.cross_tokens, imported=True)
    (computed,) = manager.computed(seq).tolist()
    cache = apply_moves_by_replica(cache, moves_of_one(cache, manager.take_moves(), replica), host)
    cache = pages_from_arrays(cache, _targets(manager, seq, pages, computed), pages.arrays, replica)
    manager.commit(seq, len(prompt) - computed)
    return cache, seq


def _targets(manager: PageManager, seq: int, pages: SequencePages, computed: int) -> Int32[np.ndarray, " n"]:
    """The page that takes each of `pages`; the null page where it is here already."""
    group, index = pages.places.T
    grows = np.array([each.is_self_attention for each in pages.groups])[group]
    here = grows & (index < computed // manager.page_size)
    return np.where(here, 0, manager.page_tables(seq)[group, 0, index]).astype(np.int32)
