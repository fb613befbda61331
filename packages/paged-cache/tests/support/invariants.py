"""The invariants of a page manager: checked after each operation."""

import copy
from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np
from plain_manager import PlainSequence, first_seen
from simulated_device import EMPTY, SimulatedDevice

from paged_cache._src.manager import IndexedPage

if TYPE_CHECKING:
    from checked_manager import CheckedManager


def check_all(checked: "CheckedManager") -> None:
    """Check counts, refcounts, page tables, the device's content, and the prefix index."""
    tables = checked.manager.page_tables(checked.running)  # [groups, n, pages_per_seq]
    refcounts = checked.manager.refcounts(np.arange(checked.config.num_pages))
    _check_refcounts(checked, tables, refcounts)
    _check_sequences(checked)
    device = checked.device.copy()
    device.apply(copy.deepcopy(checked.manager._pages.log).take())  # a look at the moves, without taking them
    cached = checked.manager.indexed_pages()
    shared = refcounts > 1
    shared[[content.page for content in cached]] = True
    for at, seq in enumerate(checked.running):
        _check_tail(checked, seq, tables[:, at], shared)
        for group, table in enumerate(tables[:, at]):
            _check_table(checked, checked[seq], group, table)
            _check_content(checked, checked[seq], group, table, device)
            _check_writable(checked, checked[seq], group, table, shared)
    for content in cached:
        _check_indexed_page(checked, content, device)
    _check_free_pages(checked, refcounts, cached, device)


def _check_refcounts(checked: "CheckedManager", tables: np.ndarray, refcounts: np.ndarray) -> None:
    """A refcount is the number of tables and pins that name the page. Every page is free or in use."""
    manager, num_pages = checked.manager, checked.config.num_pages
    named = np.concatenate([tables[tables > 0], *(pin.pages for pin in checked.pins)]).astype(np.int64)
    times = np.bincount(named, minlength=num_pages)
    assert refcounts.tolist() == times.tolist(), (
        f"refcounts are {refcounts}, but tables and pins name pages {times} times"
    )
    assert manager.num_used == (refcounts > 0).sum(), "used pages"
    assert manager.num_free + manager.num_used == num_pages - 1, "free and used pages are not all"
    stats = manager.stats()
    assert stats.num_empty + stats.num_cached == manager.num_free, "empty and cached pages are not all free pages"
    assert stats.num_seqs == len(checked.plain.sequences), "sequences"
    assert (stats.queried_tokens, stats.cached_tokens) == (checked.queried, checked.reused), "tokens queried and reused"
    assert stats.evictions == checked.events.evicted, "evictions"
    assert stats.unused_slots == _unused_slots(checked, tables), "slots without a token"


def _unused_slots(checked: "CheckedManager", tables: np.ndarray) -> int:
    """Slots of pages in use that hold a token of no sequence. Pinned pages are full."""
    size = checked.config.page_size
    filled: dict[int, int] = defaultdict(int)
    for page in [page for pin in checked.pins for page in pin.pages.tolist()]:
        filled[page] = size
    for at, seq in enumerate(checked.running):
        for group, table in zip(checked.config.groups, tables[:, at].tolist(), strict=True):
            length = checked[seq].length if group.is_self_attention else len(checked[seq].cross)
            for index, page in enumerate(table):
                if page:
                    filled[page] = max(filled[page], min(size, length - index * size))
    return size * len(filled) - sum(filled.values())


def _check_sequences(checked: "CheckedManager") -> None:
    """Tokens and lengths agree with the model."""
    for seq, sequence in checked.plain.sequences.items():
        numbers = checked.manager.lengths(seq).tolist(), checked.manager.computed(seq).tolist()
        assert numbers == ([sequence.length], [sequence.computed]), f"{numbers} are not those of {sequence}"
        told = [token if known else -1 for token, known in zip(sequence.tokens, sequence.known, strict=True)]
        assert checked.manager.token_ids(seq).tolist() == told, f"tokens of {sequence}"


def _check_table(checked: "CheckedManager", sequence: PlainSequence, index: int, table: np.ndarray) -> None:
    """The page table has exactly the pages that later queries see or that have a slot."""
    group, size = checked.config.groups[index], checked.config.page_size
    stop = -(-(sequence.length if group.is_self_attention else len(sequence.cross)) // size)
    first, settled = (first_seen(group, n) // size for n in (sequence.computed, sequence.settled))
    assert (table[first:stop] > 0).all(), f"{group} needs pages {first} to {stop} of {table}"
    assert not table[stop:].any(), f"{group} has pages after the last token, {stop}, in {table}"
    assert not table[:settled].any(), f"{group} has pages that nobody sees, before {settled}, in {table}"


def _check_content(
    checked: "CheckedManager", sequence: PlainSequence, index: int, table: np.ndarray, device: SimulatedDevice
) -> None:
    """The device has this sequence's tokens wherever a query can look. With scrub, other slots are zero."""
    group, size = checked.config.groups[index], checked.config.page_size
    contents = (
        sequence.contents[: sequence.written] if group.is_self_attention else sequence.cross * sequence.cross_written
    )
    first = first_seen(group, sequence.computed)
    expected = checked.plain.contents.cells(contents[first:], index)
    assert device.read(table, first, len(contents)).tolist() == expected.tolist(), f"{group} reads something else"
    if checked.config.scrub:
        pages = device.pages[table[table > 0]]
        assert checked.plain.contents.namespaces(pages) <= {None, sequence.namespace}, "another namespace can be read"
        assert (device.pages[table[-(-len(contents) // size) :]] <= EMPTY).all(), "a page was not scrubbed"


def _check_writable(
    checked: "CheckedManager", sequence: PlainSequence, index: int, table: np.ndarray, shared: np.ndarray
) -> None:
    """Slots that are still to be written lie in private pages."""
    size = checked.config.page_size
    if checked.config.groups[index].is_self_attention and sequence.computed < sequence.length:
        pages = table[sequence.computed // size : -(-sequence.length // size)]
        assert not shared[pages].any(), f"pages {pages} are to be written, but they are shared or indexed"


def _check_tail(checked: "CheckedManager", seq: int, tables: np.ndarray, shared: np.ndarray) -> None:
    """If a tail page is marked as private, it is private."""
    page, inside = divmod(checked[seq].length, checked.config.page_size)
    if inside and checked.manager._seqs.has_private_tail[seq % checked.manager.max_seqs]:
        tails = tables[[group.is_self_attention for group in checked.config.groups], page]
        assert not shared[tails].any(), f"{tails} are not private"


def _check_indexed_page(checked: "CheckedManager", content: IndexedPage, device: SimulatedDevice) -> None:
    """An indexed page really holds its content: these tokens, of this group, after the parent's tokens."""
    numbers = checked.plain.contents
    tokens = np.frombuffer(content.token_ids, "<i4").tolist()
    cells = device.pages[content.page, : len(tokens)]
    chain = (cells // numbers.num_groups).tolist()
    assert (cells > EMPTY).all(), f"{content} is not there"
    assert (cells % numbers.num_groups == content.group).all(), f"{content} is of another group"
    assert [numbers.token[number][0] for number in chain] == tokens, f"{content} has other tokens"
    assert [numbers.before[number] for number in chain[1:]] == chain[:-1], f"{content} is of several texts"
    before = numbers.before[chain[0]]
    assert checked.names.setdefault(content.parent_hash, before) == before, f"{content} goes on from another text"
    if content.hash:
        assert len(tokens) == checked.config.page_size, f"{content} is not full"
        assert checked.names.setdefault(content.hash, chain[-1]) == chain[-1], f"{content} is named like another text"


def _check_free_pages(
    checked: "CheckedManager", refcounts: np.ndarray, cached: list[IndexedPage], device: SimulatedDevice
) -> None:
    """Free indexed pages are the cached ones. Subscribers know all indexed pages. With scrub, others are zero."""
    indexed = {content.page for content in cached}
    assert checked.events.indexed == {content.page: content.hash for content in cached}, "events say something else"
    free = set(np.flatnonzero(refcounts[1:] == 0) + 1)
    assert checked.manager.num_cached == len(free & indexed), "cached pages"
    if checked.config.scrub:
        assert (device.pages[list(free - indexed)] == EMPTY).all(), "a page that was released can be read"
