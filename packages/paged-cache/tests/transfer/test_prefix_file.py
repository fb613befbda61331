"""What a cache keeps of prefixes, to a file and into another cache; all bytes of both are known."""

import numpy as np
import pytest
from filled_cache import NUM_PAGES, PAGE_SIZE, assert_same, filled_cache, mesh_of, pages_of, stored
from managing import picture
from resigned import other_arrays, other_manifests

from paged_cache import PagedAttentionCache
from paged_cache._src.manager import LayerGroup, Media, PageManager, Prompt
from paged_cache._src.transfer.prefix_file import load_prefix_cache, save_prefix_cache
from paged_cache._src.transfer.sequence_pages import export_sequence

TOKENS = list(range(100, 110))
"""Two pages and a half."""


def manager_of(*groups, num_pages=NUM_PAGES, **changes):
    groups = groups or (LayerGroup.full(),)
    return PageManager(num_pages, PAGE_SIZE, max_seqs=3, max_sequence_length=32, groups=groups, **changes)


def keep(manager, prompt):
    """Pages that hold a prompt: indexed and free."""
    seq = manager.admit(prompt)
    manager.commit(seq, len(prompt) - manager.computed(seq)[0])
    manager.release(seq)
    manager.take_moves()


def holding(manager):
    """The page of each content that can be found."""
    return {(page.group, page.parent_hash, page.token_ids): page.page for page in manager.indexed_pages()}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "prefixes.safetensors"


@pytest.mark.parametrize("kind", [{"dtype": "bfloat16"}, {"dtype": "int8"}, {"dtype": "float8_e4m3fn"}])
def test_after_a_restart_all_pages_are_cache_hits_again(path, kind):
    source, before = manager_of(), filled_cache(**kind)
    keep(source, [9] * 6)
    keep(source, Prompt(TOKENS, namespace="tenant"))
    save_prefix_cache(path, before, source)
    manager, cache = manager_of(), filled_cache(**kind, seed=1)
    manager.admit([1] * 5)  # so that pages have other ids
    untouched = stored(cache)
    cache = load_prefix_cache(path, cache, manager)
    assert (manager.cached_tokens(Prompt([*TOKENS, 1], namespace="tenant")), manager.cached_tokens([9] * 7)) == (10, 6)
    assert manager.cached_tokens([*TOKENS, 1]) == 0
    there, here = holding(source), holding(manager)
    assert here.keys() == there.keys()
    for content, page in there.items():
        for old, new in zip(pages_of(before, [page]), untouched, strict=True):
            new[here[content]] = old[0]
    assert_same(stored(cache), untouched)
    assert not manager.take_moves()


def test_indexed_pages_in_use_are_saved_too_and_media_count(path):
    source = manager_of()
    picture = Media(start=1, stop=3, digest=b"of the picture")
    seq = source.admit(Prompt(TOKENS, media=[picture]))
    source.commit(seq, 10)
    save_prefix_cache(path, filled_cache(), source)
    manager = manager_of()
    load_prefix_cache(path, filled_cache(), manager)
    assert (manager.cached_tokens(Prompt(TOKENS, media=[picture])), manager.cached_tokens(TOKENS)) == (8, 0)


def test_groups_of_layers_have_pages_of_their_own(path):
    groups = (LayerGroup.full([0, 2]), LayerGroup.window(6, [1, 3]))
    source, before = manager_of(*groups), filled_cache()
    keep(source, TOKENS)
    save_prefix_cache(path, before, source)
    manager = manager_of(*groups)
    cache = load_prefix_cache(path, filled_cache(seed=1), manager)
    assert manager.cached_tokens([*TOKENS, 1]) == 10
    there, here = holding(source), holding(manager)
    assert_same(pages_of(cache, [here[content] for content in there]), pages_of(before, list(there.values())))


def test_indexed_content_stays_and_nothing_is_evicted(path):
    source = manager_of()
    keep(source, TOKENS)
    save_prefix_cache(path, filled_cache(), source)
    manager, cache = manager_of(num_pages=4), filled_cache(seed=1)
    keep(manager, TOKENS[:4])
    keep(manager, [7] * 4)
    kept, before = holding(manager), stored(cache)
    cache = load_prefix_cache(path, cache, manager)
    assert holding(manager).items() >= kept.items()
    assert (manager.cached_tokens([*TOKENS, 1]), manager.num_cached) == (
        8,
        3,
    )  # room for one page, and it is the second
    page = next(iter(set(holding(manager).values()) - set(kept.values())))
    assert_same(*([np.delete(array, page, axis=0) for array in arrays] for arrays in (stored(cache), before)))


def test_scrubbing_comes_before_loading(path):
    source, before = manager_of(), filled_cache()
    keep(source, TOKENS)
    save_prefix_cache(path, before, source)
    manager = manager_of(num_pages=4, scrub=True)
    seq = manager.admit([3] * 12)
    manager.release(seq)  # never computed: its pages are to be zeroed, and are the only ones
    cache = load_prefix_cache(path, filled_cache(seed=1), manager)
    there, here = holding(source), holding(manager)
    assert_same(pages_of(cache, [here[content] for content in there]), pages_of(before, list(there.values())))


def test_split_over_heads_and_replicas(path):
    before, source = filled_cache(mesh_of(dp=2, tp=2), "dp"), manager_of()
    keep(source, TOKENS)
    save_prefix_cache(path, before, source, replica=1)
    manager, cache = manager_of(), filled_cache(mesh_of(tp=2), seed=1)
    cache = load_prefix_cache(path, cache, manager)
    there, here = holding(source), holding(manager)
    want = pages_of(before, [NUM_PAGES + page for page in there.values()])
    assert_same(pages_of(cache, [here[content] for content in there]), want)


def test_of_nothing_nothing_is_loaded(path):
    save_prefix_cache(path, filled_cache(), manager_of())
    cache, manager = filled_cache(), manager_of()
    before = stored(cache)
    assert_same(stored(load_prefix_cache(path, cache, manager)), before)
    assert manager.num_cached == 0


def test_progress_is_told_of_every_part(path, monkeypatch):
    monkeypatch.setattr("paged_cache._src.transfer.contents.STAGED_PAGES", 2)
    manager, parts = manager_of(), []
    keep(manager, TOKENS)

    def bar(all_parts):
        parts.append(len(all_parts))
        return all_parts

    save_prefix_cache(path, filled_cache(), manager, progress=bar)
    assert parts == [2]


def refused(path, cache, manager, error, message, **changes):
    before = stored(cache)
    with pytest.raises(error, match=message):
        load_prefix_cache(path, cache, manager, **changes)
    assert_same(stored(cache), before)
    assert (manager.num_cached, manager.num_used) == (0, 0)


def test_files_that_do_not_fit_are_refused_and_nothing_is_loaded(path):
    manager = manager_of()
    keep(manager, TOKENS)
    save_prefix_cache(path, filled_cache(), manager, model="a")
    wrong_model = r"prefixes\.safetensors: the file has model='a', but here it is 'b'; load it where both are the same"
    refused(path, filled_cache(), manager_of(), ValueError, wrong_model, model="b")
    refused(path, filled_cache(dtype="int8"), manager_of(), ValueError, "pages have dtype=bfloat16, but the cache has")
    refused(
        path,
        filled_cache(),
        manager_of(LayerGroup.window(4)),
        ValueError,
        r"has groups=.*full.*, but here it is",
        model="a",
    )
    refused(path, filled_cache(), manager_of(num_host_pages=2), ValueError, "host is None", model="a")
    refused(path, filled_cache(), manager_of(num_pages=40), ValueError, "has num_pages=40, but the cache has 12")
    unlike = PagedAttentionCache(filled_cache(views=1).views + filled_cache(views=1, num_kv_heads=4).views)
    refused(path, unlike, manager_of(), NotImplementedError, "layers have pages of 2 kinds")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "cannot be read as safetensors"),
        (lambda data: data[:-200] + b"?" + data[-199:], "is damaged: .* does not have its checksum"),
        (lambda data: b"PK" + data, "cannot be read as safetensors"),
    ],
)
def test_damaged_files_are_refused_and_nothing_is_loaded(path, damage, message):
    manager = manager_of()
    keep(manager, TOKENS)
    save_prefix_cache(path, filled_cache(), manager)
    path.write_bytes(damage(path.read_bytes()))
    refused(path, filled_cache(), manager_of(), ValueError, message)


def test_a_file_of_a_sequence_is_another_kind(path):
    manager = manager_of()
    seq = manager.admit(TOKENS)
    manager.commit(seq, 10)
    export_sequence(filled_cache(), manager, seq).save(path)
    refused(
        path, filled_cache(), manager_of(), ValueError, "holds a sequence of paged-cache, but a prefix cache is asked"
    )


def test_files_with_right_checksums_and_wrong_facts_show_no_page_of_others(path):
    """Each is refused and changes nothing, or all pages that are indexed then hold pages of the file."""
    groups = (LayerGroup.full([0, 2]), LayerGroup.window(6, [1]))
    source, theirs = manager_of(*groups), filled_cache()
    keep(source, TOKENS)
    save_prefix_cache(path, theirs, source)
    data = path.read_bytes()
    of_file = {page.tobytes() for page in pages_of(theirs, [page.page for page in source.indexed_pages()])[0]}
    cache, refusals, loads = filled_cache(seed=1), 0, 0
    before = stored(cache)
    for name, other in [("as it was", data), *other_manifests(data), *other_arrays(data, "prefix cache")]:
        if "view." in name and " = " not in name:
            continue  # other keys and values
        path.write_bytes(other)
        manager = manager_of(*groups)
        empty = picture(manager)
        try:
            cache = load_prefix_cache(path, cache, manager)
        except ValueError:
            refusals += 1
            assert picture(manager) == empty, name
            assert_same(stored(cache), before)
        else:
            loads += 1
            indexed = [page.page for page in manager.indexed_pages()]
            assert {page.tobytes() for page in pages_of(cache, indexed)[0]} <= of_file, name
            cache = filled_cache(seed=1)
    assert refusals > 700
    assert loads > 5
    assert_same(stored(cache), before)


def test_pages_that_cannot_be_written_are_no_hits(path, monkeypatch):
    source = manager_of()
    keep(source, TOKENS)
    save_prefix_cache(path, filled_cache(), source)
    manager = manager_of()
    monkeypatch.setattr("paged_cache._src.transfer.contents._write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load_prefix_cache(path, filled_cache(), manager)
    assert (manager.num_cached, manager.num_used, manager.cached_tokens(TOKENS)) == (0, 0, 0)
