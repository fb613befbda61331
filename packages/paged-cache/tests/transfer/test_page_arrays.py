"""Pages as arrays by name; that they go round is in the tests of transfers and snapshots."""

from types import SimpleNamespace

import numpy as np
import pytest
from filled_cache import NUM_PAGES, assert_same, filled_cache, mesh_of, moved, moves_of, stored

from paged_cache._src.transfer.page_arrays import (
    arrays_from_pages,
    check_fits,
    check_pool,
    layout_of,
    pages_from_arrays,
)

IDS = np.array([7, 2, 9], np.int32)


def test_each_view_has_an_array_of_data_and_one_of_scales():
    cache = filled_cache(dtype="int8")
    arrays = arrays_from_pages(cache, IDS, 0)
    assert list(arrays) == ["view.0.data", "view.0.scales", "view.1.data", "view.1.scales"]
    for view, each in enumerate(cache.views):
        np.testing.assert_array_equal(arrays[f"view.{view}.data"], np.asarray(each.pages.data)[IDS])
        np.testing.assert_array_equal(arrays[f"view.{view}.scales"], np.asarray(each.pages.scales)[IDS])
    check_fits(cache, layout_of(cache), arrays, 3)


@pytest.mark.parametrize("replica", [0, 1])
def test_arrays_go_to_the_pages_of_their_replica(replica):
    cache = filled_cache(mesh_of(dp=2, tp=2), "dp")
    arrays = arrays_from_pages(cache, IDS, replica)
    copied = moves_of(copy_from=[7, 9], copy_to=[1, 4])
    want = moved(stored(cache), copied, first=replica * NUM_PAGES)
    assert_same(stored(pages_from_arrays(cache, np.array([1, 0, 4]), arrays, replica)), want)


def test_the_layout_must_be_equal_in_both_caches():
    layout = layout_of(filled_cache(v_head_dim=4))
    sizes = {"page_size": 4, "kv_heads": 2, "views": 2}
    assert layout == sizes | {"k_dim": 8, "v_dim": 4, "dtype": "bfloat16", "latent": False}


def test_what_does_not_fit_is_named():
    cache = filled_cache()
    with pytest.raises(ValueError, match="the pages have page_size=8, but the cache has page_size=4; use a cache with"):
        check_fits(cache, layout_of(cache) | {"page_size": 8}, {}, 0)
    with pytest.raises(ValueError, match="the pages have k_dim=None, but the cache has k_dim=8"):
        check_fits(cache, {"page_size": 4, "kv_heads": 2, "views": 2}, {}, 0)
    with pytest.raises(ValueError, match="the manager has num_pages=13, but the cache has 12"):
        check_pool(cache, 13, 0)
    with pytest.raises(ValueError, match=r"replica=1 must lie in 0\.\.0"):
        check_pool(cache, 12, 1)


def test_pages_of_several_processes_cannot_be_arrays_of_one():
    data = SimpleNamespace(is_fully_addressable=False)
    cache = SimpleNamespace(views=[SimpleNamespace(pages=SimpleNamespace(data=data))])
    with pytest.raises(
        NotImplementedError, match=r"split over several processes, .* export and save from a cache whose"
    ):
        arrays_from_pages(cache, IDS, 0)
