"""Exports a sequence's pages and imports them into another cache, where it continues."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import Int32

from paged_cache._src.cache.cache import PagedAttentionCache
from paged_cache._src.manager import KVShape, LayerGroup, Media, PageManager, Prompt
from paged_cache._src.manager.sequences import check_integer
from paged_cache._src.transfer.apply_moves import apply_moves_by_replica, moves_of_one
from paged_cache._src.transfer.archive import Archive, reading
from paged_cache._src.transfer.host_pages import HostPages
from paged_cache._src.transfer.page_arrays import (
    arrays_from_pages,
    check_array,
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
    """The pages of a sequence, for a cache with the same layout and the same layer groups.

    Raises:
        ValueError: `token_ids` or `places` are not int32 of this shape, or `cross_tokens` is no whole number.
    """

    token_ids: Int32[np.ndarray, " tokens"]
    """The tokens whose keys and values the pages hold."""
    cross_tokens: int
    """Tokens that cross-attention sees."""
    places: Int32[np.ndarray, "n 2"]
    """For each page its layer group and its number in the page table of that group; all that later queries see."""
    groups: tuple[LayerGroup, ...]
    """The layer groups."""
    layout: dict[str, Any]
    """Page size, KV heads, number of views, and the fields of `KVLayout`."""
    arrays: dict[str, np.ndarray]
    """The pages: `view.0.data` `[n, kv_heads, page_size, storage_lanes]`, `view.0.scales` if they have any, ..."""

    def __post_init__(self) -> None:
        check_integer("cross_tokens", self.cross_tokens, 0)
        check_array(TOKEN_IDS, self.token_ids, (self.token_ids.size,), np.int32)
        check_array(PLACES, self.places, (self.places.size // 2, 2), np.int32)

    def to_bytes(self) -> bytes:
        """The bytes of a safetensors file with checksums."""
        return self._archive().to_bytes()

    def save(self, path: str | Path) -> None:
        """Write that file. `path` is never half written; if it is a symbolic link, the file that it names is written.

        Raises:
            ValueError: `path` is a device, a pipe, a directory or something else that is no regular file.
        """
        self._archive().save(path)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read the result of `to_bytes`.

        Raises:
            ValueError: it is damaged, or of another kind or version; says which.
        """
        return cls._from(Archive.from_bytes(data, KIND))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file that `save` wrote.

        Raises:
            ValueError: it is damaged, or of another kind or version; says which.
        """
        with reading(path):
            return cls._from(Archive.load(path, KIND))

    def _archive(self) -> Archive:
        groups = [dataclasses.asdict(group) for group in self.groups]
        facts = {"cross_tokens": self.cross_tokens, "groups": groups, "layout": self.layout}
        return Archive(KIND, facts, {TOKEN_IDS: self.token_ids, PLACES: self.places, **self.arrays})

    @classmethod
    def _from(cls, archive: Archive) -> Self:
        archive.require(("cross_tokens", "groups", "layout"), (TOKEN_IDS, PLACES))
        arrays, facts = dict(archive.arrays), archive.facts
        return cls(
            token_ids=arrays.pop(TOKEN_IDS),
            cross_tokens=facts["cross_tokens"],
            places=arrays.pop(PLACES),
            groups=_groups(facts["groups"]),
            layout=facts["layout"],
            arrays=arrays,
        )


def _groups(facts: Any) -> tuple[LayerGroup, ...]:
    """Layer groups, from a list of their `dataclasses.asdict` in JSON.

    Raises:
        ValueError: it is no such list.
    """
    try:
        return tuple(map(_group, facts))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"groups={facts!r} must be a list of layer groups ({error}); export the sequence again"
        ) from error


def _group(facts: dict[str, Any]) -> LayerGroup:
    kv = None if facts["kv"] is None else KVShape(**facts["kv"])
    return LayerGroup(**facts | {"layers": tuple(facts["layers"]), "kv": kv})


def _needed_places(
    groups: Sequence[LayerGroup], page_size: int, num_tokens: int, cross_tokens: int
) -> list[tuple[int, int, int]]:
    """For each group `(group, start, stop)`: page numbers `start .. stop - 1` hold what later queries see."""
    lengths = [num_tokens if group.is_self_attention else cross_tokens for group in groups]
    each = enumerate(zip(groups, lengths, strict=True))
    return [(at, group.first_needed(length) // page_size, -(-length // page_size)) for at, (group, length) in each]


def _places(needed: Sequence[tuple[int, int, int]]) -> Int32[np.ndarray, "n 2"]:
    pairs = [(group, number) for group, start, stop in needed for number in range(start, stop)]
    return np.array(pairs, np.int32).reshape(-1, 2)


def export_sequence(cache: PagedAttentionCache, manager: PageManager, seq: int, *, replica: int = 0) -> SequencePages:
    """Export the pages of a sequence's computed tokens. The sequence does not change.

    Apply `manager.take_moves` to the cache first.

    Args:
        cache: the pages of all layers.
        manager: the page manager of the cache.
        seq: the sequence's id.
        replica: with a `data_axis`, the replica whose manager it is.

    Raises:
        ValueError: no token is computed, token ids are not known, or the sequence is swapped out.
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
    places = _places(_needed_places(manager.groups, manager.page_size, computed, cross_tokens))
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
    """Add a sequence with these pages, fully computed. Returns the cache, which is donated, and the sequence's id.

    A prefix that is a cache hit is shared and not written again. All other pages that the sequence gets are written.
    What `pages` say of themselves is compared with the cache and the manager before anything changes. Only the keys
    and values are trusted. The caller gives the namespace, the adapter and the media. Applies `manager.take_moves`
    first.

    If moving or writing pages fails, or is interrupted, the sequence is released and the prefix index is cleared: what
    the pages hold is not known then.

    Args:
        cache: the pages of all layers.
        manager: the page manager of the cache.
        pages: the result of `export_sequence`.
        namespace: as for `Prompt`.
        adapter: as for `Prompt`.
        media: as for `Prompt`.
        host: as for `apply_moves`; needed if the manager has host pages, because moves may be waiting.
        replica: with a `data_axis`, the replica whose manager it is.

    Raises:
        ValueError: the pages do not fit the cache or the manager; nothing changes.
        OutOfPages: not enough pages are free; nothing changes.
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
    _check_places(manager, pages)
    prompt = Prompt(pages.token_ids, namespace=namespace, adapter=adapter, media=media)
    seq = manager.admit(prompt, cross_tokens=pages.cross_tokens, imported=True)
    try:
        (computed,) = manager.computed(seq).tolist()
        cache = apply_moves_by_replica(cache, moves_of_one(cache, manager.take_moves(), replica), host)
        cache = pages_from_arrays(cache, _targets(manager, seq, pages, computed), pages.arrays, replica)
        manager.commit(seq, len(prompt) - computed)
    except BaseException:
        manager.reset_prefix_cache()
        manager.release(seq)
        raise
    return cache, seq


def _check_places(manager: PageManager, pages: SequencePages) -> None:
    """Check that there is each page that the tokens need, once, in order, and no other.

    Raises:
        ValueError: a page is missing, doubled, out of order or out of range.
    """
    needed = _needed_places(manager.groups, manager.page_size, len(pages.token_ids), pages.cross_tokens)
    n = sum(stop - start for _, start, stop in needed)  # may be far more than memory holds
    if n != len(pages.places) or not np.array_equal(pages.places, _places(needed)):
        raise ValueError(
            f"places has {len(pages.places)} pages; they must be the {n} that later queries see of "
            f"{len(pages.token_ids)} tokens and {pages.cross_tokens} cross tokens, each group's in order and each "
            "page once; export the sequence again"
        )


def _targets(manager: PageManager, seq: int, pages: SequencePages, computed: int) -> Int32[np.ndarray, " n"]:
    """The page id to write each page to; the null page where the prefix is a cache hit."""
    group, number = pages.places.T
    is_own = np.array([each.is_self_attention for each in pages.groups])[group]
    hit = is_own & (number < computed // manager.page_size)
    return np.where(hit, 0, manager.page_tables(seq)[group, 0, number]).astype(np.int32)
