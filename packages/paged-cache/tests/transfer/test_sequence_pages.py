"""Sequences that are computed in one cache and go on in another; all bytes of both are known."""

import dataclasses

import numpy as np
import pytest
from filled_cache import KINDS, NUM_PAGES, PAGE_SIZE, assert_same, filled_cache, mesh_of, pages_of, stored
from managing import picture
from managing import refused as refused_without_change
from resigned import other_arrays, other_manifests

from paged_cache._src.manager import LayerGroup, OutOfPages, PageManager, Prompt
from paged_cache._src.transfer.host_pages import HostPages
from paged_cache._src.transfer.sequence_pages import SequencePages, export_sequence, import_sequence

TOKENS = list(range(100, 110))
"""Two pages and a half."""


def manager_of(*groups, num_pages=NUM_PAGES, page_size=PAGE_SIZE, **changes):
    groups = groups or (LayerGroup.full(),)
    return PageManager(num_pages, page_size, max_seqs=3, max_sequence_length=32, groups=groups, **changes)


def computed(manager, token_ids=TOKENS, **admit):
    """A sequence of which all is computed."""
    seq = manager.admit(token_ids, **admit)
    manager.commit(seq, len(token_ids) - manager.computed(seq)[0])
    manager.take_moves()
    return seq


def exported(cache, *groups, token_ids=TOKENS, **admit):
    manager = manager_of(*groups)
    manager.admit([1] * 5)  # so that pages have other ids than where they go
    seq = computed(manager, token_ids, **admit)
    return export_sequence(cache, manager, seq), pages_of(cache, manager.page_tables(seq)[0, 0, :3])


def as_it_is(pages, path):
    return pages


def as_bytes(pages, path):
    return SequencePages.from_bytes(pages.to_bytes())


def as_file(pages, path):
    pages.save(path / "sequence.safetensors")
    return SequencePages.load(path / "sequence.safetensors")


def check_written(before, after, page_ids, want):
    """These pages, and no others, hold `want`."""
    for old, new, pages in zip(before, after, want, strict=True):
        old[page_ids] = pages
        np.testing.assert_array_equal(new, old)


@pytest.mark.parametrize(
    ("kind", "send"), [*((kind, as_bytes) for kind in KINDS), ("int8", as_it_is), ("int8", as_file)]
)
def test_the_pages_arrive_byte_for_byte(kind, send, tmp_path):
    pages, want = exported(filled_cache(**KINDS[kind]))
    cache, manager = filled_cache(**KINDS[kind], seed=1), manager_of()
    before = stored(cache)
    cache, seq = import_sequence(cache, manager, send(pages, tmp_path))
    check_written(before, stored(cache), manager.page_tables(seq)[0, 0, :3], want)
    assert (manager.computed(seq), manager.lengths(seq)) == (10, 10)
    assert manager.token_ids(seq).tolist() == TOKENS
    assert manager.cached_tokens(TOKENS) == 8  # for others too
    manager.extend(seq, 1, [7])


@pytest.mark.parametrize(("here", "there"), [({}, {"tp": 2}), ({"tp": 2}, {}), ({"tp": 2}, {"tp": 1})])
def test_the_two_caches_may_be_split_differently(here, there):
    source, target = (filled_cache(mesh_of(**sizes) if sizes else None, dtype="int8") for sizes in (here, there))
    pages, want = exported(source)
    manager = manager_of()
    target, seq = import_sequence(target, manager, pages)
    assert_same(pages_of(target, manager.page_tables(seq)[0, 0, :3]), want)


def test_between_replicas():
    cache, managers = filled_cache(mesh_of(dp=2, tp=2), "dp"), [manager_of(), manager_of()]
    managers[1].admit([1] * 5)
    seq = computed(managers[1])
    pages = export_sequence(cache, managers[1], seq, replica=1)
    want, before = pages_of(cache, NUM_PAGES + managers[1].page_tables(seq)[0, 0, :3]), stored(cache)
    cache, seq = import_sequence(cache, managers[0], pages, replica=0)
    check_written(before, stored(cache), managers[0].page_tables(seq)[0, 0, :3], want)
    with pytest.raises(ValueError, match=r"replica=2 must lie in 0\.\.1"):
        export_sequence(cache, managers[0], seq, replica=2)


def test_pages_that_hold_its_prefix_are_shared_and_not_written():
    pages, want = exported(filled_cache())
    cache, manager = filled_cache(seed=1), manager_of()
    other = computed(manager, TOKENS[:5])
    before = stored(cache)
    cache, seq = import_sequence(cache, manager, pages)
    table = manager.page_tables(seq)[0, 0]
    assert table[0] == manager.page_tables(other)[0, 0, 0]
    check_written(before, stored(cache), table[1:3], [array[1:] for array in want])


def test_a_page_that_holds_a_part_is_copied_and_then_written_whole():
    pages, want = exported(filled_cache())
    cache, manager = filled_cache(seed=1), manager_of()
    manager.release(computed(manager, TOKENS[:6]))
    before = stored(cache)
    cache, seq = import_sequence(cache, manager, pages)
    assert manager.stats().cached_tokens == 6
    check_written(before, stored(cache), manager.page_tables(seq)[0, 0, 1:3], [array[1:] for array in want])


def test_moves_that_were_waiting_come_first():
    pages, want = exported(filled_cache())
    manager = manager_of(scrub=True, prefix_reuse=False, num_pages=4)
    manager.release(computed(manager))  # its pages are to be zeroed, and they are the only ones
    cache, seq = import_sequence(filled_cache(seed=1, num_pages=4), manager, pages)
    assert_same(pages_of(cache, manager.page_tables(seq)[0, 0, :3]), want)
    assert not manager.take_moves()


@pytest.mark.parametrize("scrub", [False, True])
def test_a_window_exports_what_later_queries_see_and_the_rest_is_no_hit(scrub):
    groups = (LayerGroup.full(), LayerGroup.window(3))
    source, cache = manager_of(*groups), filled_cache()
    seq = computed(source)
    pages = export_sequence(cache, source, seq)
    assert pages.places.tolist() == [[0, 0], [0, 1], [0, 2], [1, 2]]
    want = pages_of(cache, [*source.page_tables(seq)[0, 0, :3], source.page_tables(seq)[1, 0, 2]])
    manager = manager_of(*groups, scrub=scrub)
    cache, seq = import_sequence(filled_cache(seed=1), manager, pages)
    full, window = manager.page_tables(seq)[:, 0]
    assert_same(pages_of(cache, [*full[:3], window[2]]), want)
    assert window[:2].tolist() == [0, 0]
    assert (manager.computed(seq), manager.num_used) == (10, 4)
    assert manager.cached_tokens(TOKENS) == 0  # of the window, pages 0 and 1 are nowhere
    again = export_sequence(cache, manager, seq)
    assert again.to_bytes() == pages.to_bytes()
    manager.extend(seq, 3, [1, 2, 3])
    manager.commit(seq, 3)
    manager.release(seq)
    assert manager.cached_tokens([*TOKENS, 1, 2, 3, 4]) == 13  # one that goes on from here needs only what is here


def test_cross_attention_brings_its_own_pages():
    groups = (LayerGroup.full(), LayerGroup.cross())
    source, cache = manager_of(*groups), filled_cache()
    seq = computed(source, cross_tokens=6)
    pages = SequencePages.from_bytes(export_sequence(cache, source, seq).to_bytes())
    assert pages.cross_tokens == 6
    want = pages_of(cache, source.page_tables(seq)[1, 0, :2])
    manager = manager_of(*groups)
    computed(manager, cross_tokens=6)  # the same prompt is here, but not what it looks at
    cache, seq = import_sequence(filled_cache(seed=1), manager, pages)
    assert_same(pages_of(cache, manager.page_tables(seq)[1, 0, :2]), want)
    assert manager.cross_tokens(seq) == 6


def test_the_computed_part_of_a_chunked_prompt_is_exported():
    manager = manager_of()
    seq = manager.admit(TOKENS)
    manager.commit(seq, 5)
    pages = export_sequence(filled_cache(), manager, seq)
    assert (pages.token_ids.tolist(), len(pages.places)) == (TOKENS[:5], 2)


def test_the_receiver_says_whose_it_is():
    pages, _ = exported(filled_cache())
    manager = manager_of()
    import_sequence(filled_cache(), manager, pages, namespace="tenant")
    assert (manager.cached_tokens(TOKENS), manager.cached_tokens(Prompt(TOKENS, namespace="tenant"))) == (0, 8)


def test_tokens_that_are_not_computed_or_not_known_cannot_be_exported():
    manager = manager_of()
    seq = manager.admit(TOKENS)
    with pytest.raises(ValueError, match=r"sequence 0 has 0 computed tokens, 0 of them not known; export it after"):
        export_sequence(filled_cache(), manager, seq)
    manager.extend(seq, 1)
    manager.commit(seq, 11)
    with pytest.raises(ValueError, match="has 11 computed tokens, 1 of them not known"):
        export_sequence(filled_cache(), manager, seq)


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ({"dtype": "int8"}, "the pages have dtype=bfloat16, but the cache has dtype=int8; use a cache with"),
        ({"num_kv_heads": 4}, "the pages have kv_heads=2, but the cache has kv_heads=4"),
        ({"views": 3}, "the pages have views=2, but the cache has views=3"),
        ({"v_head_dim": 4}, "the pages have v_dim=8, but the cache has v_dim=4"),
        ({"num_kv_heads": 1, "latent": True}, "the pages have kv_heads=2"),
    ],
)
def test_pages_of_another_layout_are_refused(cache, message):
    pages, _ = exported(filled_cache())
    refused(filled_cache(**cache), manager_of(), pages, ValueError, message)


def refused(cache, manager, pages, error, message):
    before, free = stored(cache), manager.num_free
    with pytest.raises(error, match=message):
        import_sequence(cache, manager, pages)
    assert_same(stored(cache), before)
    assert (manager.num_free, manager.stats().num_seqs) == (free, 0)


def test_what_else_does_not_fit_is_refused_too():
    pages, _ = exported(filled_cache())
    other_groups = manager_of(LayerGroup.full(), LayerGroup.window(4))
    refused(filled_cache(), other_groups, pages, ValueError, r"the manager has page_size=4 and groups=.*window")
    refused(filled_cache(), manager_of(page_size=8), pages, ValueError, "but the manager has page_size=8")
    refused(filled_cache(), manager_of(num_pages=3), pages, OutOfPages, "asked for 3")
    no_host = "host is None, but the manager has num_host_pages=2, .* pass the HostPages that apply_moves is given"
    refused(filled_cache(), manager_of(num_host_pages=2), pages, ValueError, no_host)
    half = dataclasses.replace(pages, arrays={name: array[:1] for name, array in pages.arrays.items()})
    wrong = r"array view\.0\.data is bfloat16 \(1, 2, 4, 128\), but must be bfloat16 \(3, 2, 4, 128\)"
    refused(filled_cache(), manager_of(), half, ValueError, wrong)
    refused(
        filled_cache(), manager_of(), dataclasses.replace(pages, arrays={}), ValueError, r"view\.0\.data is missing"
    )


def test_a_manager_of_more_pages_than_the_cache_has_is_noticed():
    pages, _ = exported(filled_cache())
    message = "the manager has num_pages=40, but the cache has 12; both must have the same number"
    refused(filled_cache(), manager_of(num_pages=40), pages, ValueError, message)


HOSTILE_GROUPS = (LayerGroup.full([0, 2]), LayerGroup.window(3, [1]), LayerGroup.cross([3]))


def hostile_archives():
    source = manager_of(*HOSTILE_GROUPS)
    seq = computed(source, cross_tokens=6)
    data = export_sequence(filled_cache(), source, seq).to_bytes()
    yield "as it was", data
    yield from other_manifests(data)
    yield from other_arrays(data, "sequence")


def test_archives_with_right_checksums_and_wrong_facts_show_no_page_of_others():
    """Each is refused and changes nothing, or all pages that the sequence has hold what the archive says."""
    cache, refusals, imports = filled_cache(seed=1), 0, 0
    before = stored(cache)
    for name, data in hostile_archives():
        manager = manager_of(*HOSTILE_GROUPS)
        empty = picture(manager)
        try:
            pages = SequencePages.from_bytes(data)
            cache, seq = import_sequence(cache, manager, pages)
        except ValueError:
            refusals += 1
            assert picture(manager) == empty, name
            assert_same(stored(cache), before)
        else:
            imports += 1
            tables = manager.page_tables(seq)[:, 0]
            assert sorted(map(tuple, np.argwhere(tables))) == sorted(map(tuple, pages.places.tolist())), name
            assert_same(pages_of(cache, tables[tuple(pages.places.T)]), written_arrays(pages))
            cache = filled_cache(seed=1)
    assert refusals > 700
    assert imports > 10
    assert_same(stored(cache), before)


def written_arrays(pages):
    names = [f"view.{view}.{kind}" for view in range(2) for kind in ("data", "scales")]
    return [pages.arrays[name].view(np.uint8) for name in names if name in pages.arrays]


@pytest.mark.parametrize(
    "places",
    [
        [[0, 0], [0, 1]],
        [[0, 0], [0, 1], [0, 1]],
        [[0, 0], [0, 2], [0, 1]],
        [[0, 0], [0, 1], [0, 3]],
        [[0, 0], [0, 1], [0, -1]],
        [[0, 0], [0, 1], [1, 2]],
        [[0, 0], [0, 1], [-1, 2]],
        [[0, 0], [0, 1], [0, 2**31 - 1]],
    ],
)
def test_places_must_be_those_of_the_tokens(places):
    pages, _ = exported(filled_cache())
    arrays = {name: array[: len(places)] for name, array in pages.arrays.items()}
    wrong = dataclasses.replace(pages, places=np.array(places, np.int32), arrays=arrays)
    message = r"places has \d pages; they must be the 3 that later queries see of 10 tokens and 0 cross tokens"
    refused(filled_cache(), manager_of(), wrong, ValueError, message)


def test_a_sequence_whose_pages_cannot_be_written_leaves_nothing(monkeypatch):
    pages, _ = exported(filled_cache())
    manager = manager_of()
    manager.release(computed(manager, TOKENS[:6]))  # a hit of a page and a half
    monkeypatch.setattr("paged_cache._src.transfer.contents._write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        import_sequence(filled_cache(), manager, pages)
    assert (manager.stats().num_seqs, manager.num_used, manager.num_cached) == (0, 0, 0)
    assert manager.cached_tokens(TOKENS) == 0


def test_host_pages_of_another_size_are_refused():
    pages, _ = exported(filled_cache())
    cache, manager = filled_cache(), manager_of(num_host_pages=3)
    host = HostPages.create(cache, 2)
    with refused_without_change(manager, ValueError, "host has num_pages=2, but the manager has num_host_pages=3"):
        import_sequence(cache, manager, pages, host=host)
