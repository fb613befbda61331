"""Pages off the devices and onto them, all views at once; what the callers make of it is in their own tests."""

import jax
import numpy as np
import pytest
from filled_cache import KINDS, NUM_PAGES, assert_same, filled_cache, mesh_of, moved, moves_of, stored

from paged_cache._src.transfer import contents

IDS = np.array([[4, 9, 2]], np.int32)


def i32(*ids):
    return np.array(ids, np.int32)


@pytest.mark.parametrize("kind", ["int8", "latent"])
@pytest.mark.parametrize("mesh_sizes", [{}, {"tp": 2}])
def test_a_content_is_one_page_of_every_view(kind, mesh_sizes):
    cache = filled_cache(mesh_of(**mesh_sizes) if mesh_sizes else None, **KINDS[kind])
    before = stored(cache)
    read = contents.read_contents(cache, IDS)
    assert_same(stored(cache), before)  # not donated
    shape = contents.content_shape(cache)
    for page, content in zip(IDS[0], read, strict=True):
        for like, got, *views in zip(
            jax.tree.leaves(shape), *(jax.tree.leaves(each) for each in (content, *cache.views)), strict=True
        ):
            assert (got.shape, got.dtype) == (like.shape, like.dtype)
            assert got.sharding.is_equivalent_to(like.sharding, got.ndim)
            want = np.stack([view[page] for view in views])
            np.testing.assert_array_equal(np.array(got).view(np.uint8), want.view(np.uint8))


def test_what_is_written_goes_to_its_pages_and_nowhere_else():
    cache = filled_cache()
    want = moved(stored(cache), moves_of(copy_from=IDS[0], copy_to=[1, 3, 5]))
    after = contents.write_contents(cache, i32([1, 3, 5]), contents.read_contents(cache, IDS))
    assert_same(stored(after), want)


def test_the_null_page_reads_as_zeros_and_is_never_written():
    cache = filled_cache(mesh_of(dp=2, tp=2), "dp")
    before = stored(cache)
    (content,) = contents.read_contents(cache, i32([3], [0]))
    data = np.asarray(content.data)
    assert np.isnan(data[:2]).any()
    assert not data[2:].any()  # the second group's views
    want = moved(before, moves_of(copy_from=[3], copy_to=[8]))
    after = contents.write_contents(cache, i32([8], [0]), [content])
    assert_same(stored(after), want)
    assert np.isnan(np.asarray(after.views[0].pages.data, np.float32)[[0, NUM_PAGES]]).all()


@pytest.mark.parametrize(("n", "sizes"), [(0, (1,)), (1, (1,)), (2, (1, 2)), (3, (1, 2, 4)), (4, (1, 2, 4))])
def test_sizes_are_powers_of_two(n, sizes):
    assert contents.padded_sizes(n) == sizes
    assert contents.pad_ids(np.ones((2, n), np.int32)).tolist() == [[1] * n + [0] * (sizes[-1] - n)] * 2


def test_chunks_hold_so_many_at_most(monkeypatch):
    monkeypatch.setattr(contents, "STAGED_PAGES", 3)
    assert [range(8)[chunk] for chunk in contents.staging_slices(8)] == [range(3), range(3, 6), range(6, 8)]
    assert not contents.staging_slices(0)
