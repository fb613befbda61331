"""Saves a prefix cache to a file, and loads it after a restart."""

import dataclasses
import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paged_cache._src.cache.cache import PagedAttentionCache
from paged_cache._src.manager import IndexedPage, PageManager
from paged_cache._src.manager.sequences import check_integer
from paged_cache._src.transfer.apply_moves import apply_moves_by_replica, moves_of_one
from paged_cache._src.transfer.archive import Archive, reading
from paged_cache._src.transfer.host_pages import HostPages
from paged_cache._src.transfer.page_arrays import (
    Progress,
    arrays_from_pages,
    check_array,
    check_fits,
    check_host,
    check_pool,
    layout_of,
    pages_from_arrays,
)

KIND = "prefix cache"
GROUP, TEXTS, LENGTHS = "kept.group", "kept.bytes", "kept.lengths"
INDEX = (GROUP, TEXTS, LENGTHS)
"""The arrays that describe the pages' contents for the prefix index."""


def save_prefix_cache(
    path: str | Path,
    cache: PagedAttentionCache,
    manager: PageManager,
    *,
    model: str = "",
    replica: int = 0,
    progress: Progress = iter,
) -> None:
    """Write all indexed pages to a safetensors file with checksums.

    The file is written under another name and then renamed, so `path` is never half written. If it is a symbolic link,
    the file that it names is written. The host needs memory for all of these pages. Apply `manager.take_moves` to the
    cache first.

    Args:
        path: the file; an existing file is replaced.
        cache: the pages of all layers.
        manager: the page manager of the cache.
        model: what computed the pages, such as a model's name and revision.
        replica: with a `data_axis`, the replica whose manager it is.
        progress: a progress bar for reading the pages, such as `tqdm.tqdm`.

    Raises:
        ValueError: `path` is a device, a pipe, a directory or something else that is no regular file.
        NotImplementedError: the layers' pages are not all of one shape, or other processes have parts of them.
    """
    check_pool(cache, manager.num_pages, replica)
    cached = manager.indexed_pages()
    page_ids = np.array([content.page for content in cached], np.int32)
    arrays = arrays_from_pages(cache, page_ids, replica, progress)
    facts = {"pages": len(cached), "layout": layout_of(cache), **_origin(manager, model)}
    Archive(KIND, facts, arrays | _cached_arrays(cached)).save(path)


def load_prefix_cache(
    path: str | Path,
    cache: PagedAttentionCache,
    manager: PageManager,
    *,
    model: str = "",
    replica: int = 0,
    host: HostPages | None = None,
) -> PagedAttentionCache:
    """Load pages from a file into empty pages, index them, and return the cache. It is donated.

    Skips content that is already indexed. Evicts nothing: loading ends when no page is empty. Applies
    `manager.take_moves` first. What the file says of itself is compared with the cache and the manager before anything
    changes. Only the keys and values are trusted.

    If moving or writing pages fails, or is interrupted, the prefix index is cleared: what the pages hold is not known
    then.

    Args:
        path: a file from `save_prefix_cache`.
        cache: the pages of all layers.
        manager: the page manager of the cache.
        model: the caller's model; must be the same as in the file.
        replica: with a `data_axis`, the replica whose manager it is.
        host: as for `apply_moves`; needed if the manager has host pages, because moves may be waiting.

    Raises:
        ValueError: the file is damaged, of another kind or version, or does not fit the cache or the manager; says
            what differs. Nothing is loaded.
        FileNotFoundError: there is no such file.
        NotImplementedError: the layers' pages are not all of one shape.
    """
    check_pool(cache, manager.num_pages, replica)
    check_host(manager, host)
    with reading(path):
        archive = Archive.load(path, KIND)
        pages = _fitting_pages(archive, cache, _origin(manager, model))
        page_ids = manager.restore(_cached_pages(archive.arrays, archive.facts["pages"]))
    try:
        cache = apply_moves_by_replica(cache, moves_of_one(cache, manager.take_moves(), replica), host)
        return pages_from_arrays(cache, page_ids, pages, replica)
    except BaseException:
        manager.reset_prefix_cache()
        raise


def _fitting_pages(archive: Archive, cache: PagedAttentionCache, origin: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of an archive that hold pages of this cache.

    Raises:
        ValueError: they do not fit the cache, or are of another origin.
    """
    archive.require(("pages", "layout", *origin), INDEX)
    n = check_integer("pages", archive.facts["pages"], 0)
    pages = {name: array for name, array in archive.arrays.items() if name not in INDEX}
    check_fits(cache, archive.facts["layout"], pages, n)
    for name, here in origin.items():
        if archive.facts[name] != here:
            raise ValueError(
                f"the file has {name}={archive.facts[name]!r}, but here it is {here!r}; load it where both are the "
                "same, or start with an empty cache"
            )
    return pages


def _origin(manager: PageManager, model: str) -> dict[str, Any]:
    """Further facts that must be equal, as JSON values."""
    groups = [dataclasses.asdict(group) | {"layers": list(group.layers)} for group in manager.groups]
    return {"model": model, "groups": groups}


def _cached_arrays(cached: Sequence[IndexedPage]) -> dict[str, np.ndarray]:
    texts = [[content.hash, content.parent_hash, content.token_ids, content.media] for content in cached]
    return {
        GROUP: np.array([content.group for content in cached], np.int32),
        LENGTHS: np.array([[len(text) for text in of_page] for of_page in texts], np.int32).reshape(-1, 4),
        TEXTS: np.frombuffer(b"".join(itertools.chain(*texts)), np.uint8),
    }


def _cached_pages(arrays: dict[str, np.ndarray], n: int) -> list[IndexedPage]:
    """The contents of `n` pages.

    Raises:
        ValueError: the arrays are not of `n` pages, or their lengths do not add up.
    """
    check_array(GROUP, arrays[GROUP], (n,), np.int32)
    check_array(LENGTHS, arrays[LENGTHS], (n, 4), np.int32)
    if n and arrays[LENGTHS].min() < 0:
        raise ValueError(f"array {LENGTHS} holds {arrays[LENGTHS].min()}; lengths must not be negative")
    check_array(TEXTS, arrays[TEXTS], (int(arrays[LENGTHS].sum(dtype=np.int64)),), np.uint8)
    text = io.BytesIO(arrays[TEXTS].tobytes())
    cached = []
    for group, lengths in zip(arrays[GROUP].tolist(), arrays[LENGTHS].tolist(), strict=True):
        page_hash, parent_hash, token_ids, media = (text.read(length) for length in lengths)
        cached.append(
            IndexedPage(page=0, group=group, hash=page_hash, parent_hash=parent_hash, token_ids=token_ids, media=media)
        )
    return cached
