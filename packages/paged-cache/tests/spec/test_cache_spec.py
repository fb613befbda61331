import pytest

from paged_cache import CacheSpec, HFConfig, KVShape, LayerGroup
from paged_cache._src.spec.cache_spec import LayerPlace

SMALL, LARGE = KVShape(num_kv_heads=2, head_dim=8), KVShape(num_kv_heads=1, head_dim=16)
FULL, WINDOW = LayerGroup.full(), LayerGroup.window(8)
GEMMA_4 = CacheSpec.of_layers([(WINDOW, SMALL), (WINDOW, SMALL), (FULL, LARGE)] * 2, shared_layers=[(4, 3), (5, 2)])
"""Four layers that store something: three small ones with a window, a large one that sees all."""


def test_one_group_for_each_way_of_seeing_and_each_shape():
    spec = CacheSpec.of_layers([(FULL, SMALL), (WINDOW, SMALL), (FULL, LARGE), (FULL, SMALL)])
    assert spec.groups == (
        LayerGroup.full((0, 3), SMALL),
        LayerGroup.window(8, (1,), SMALL),
        LayerGroup.full((2,), LARGE),
    )
    assert (spec.num_layers, spec.num_stored_layers, spec.shapes) == (4, 4, (SMALL, LARGE))


def test_layers_of_one_kind_have_a_group_and_a_view_each():
    spec = CacheSpec.uniform(3, SMALL)
    assert spec.pool_groups() == spec.groups == (LayerGroup.full((0, 1, 2), SMALL),)
    assert spec.views() == (SMALL,) * 3
    assert spec.places() == tuple(LayerPlace(group=0, view=view, writes=True) for view in range(3))


def test_groups_are_cut_to_the_size_of_the_smallest_and_share_views():
    spec = CacheSpec.of_layers((WINDOW if layer not in (2, 5) else FULL, SMALL) for layer in range(7))
    cut = spec.pool_groups()
    assert [(group.tokens, group.layers) for group in cut] == [(8, (0, 1)), (8, (3, 4)), (8, (6,)), (0, (2, 5))]
    assert spec.views() == (SMALL, SMALL)
    assert [(place.group, place.view) for place in spec.places()] == [
        *((0, 0), (0, 1), (3, 0), (1, 0), (1, 1), (3, 1), (2, 0)),
    ]


def test_groups_of_another_shape_have_views_of_their_own():
    assert [group.layers for group in GEMMA_4.pool_groups()] == [(0,), (1,), (3,), (2,)]
    assert GEMMA_4.views() == (SMALL, LARGE)
    assert [place.view for place in GEMMA_4.places()] == [0, 0, 1, 0, 0, 1]


def test_a_layer_that_shares_keys_has_the_place_of_their_owner_and_writes_none():
    places = GEMMA_4.places()
    assert [place.writes for place in places] == [True] * 4 + [False] * 2
    assert (places[4][:2], places[5][:2]) == (places[3][:2], places[2][:2])
    assert (GEMMA_4.num_layers, GEMMA_4.num_stored_layers) == (6, 4)


def test_a_config_that_was_read_already_is_taken_as_it_is():
    config = {"num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 16}
    assert CacheSpec.from_hf_config(HFConfig.of(config)) == CacheSpec.uniform(2, LARGE)


@pytest.mark.parametrize(
    ("groups", "shared", "message"),
    [
        ((), (), "must be at least one group, each with the layers that are in it and their kv"),
        ((LayerGroup.full(kv=SMALL),), (), "each with the layers that are in it and their kv"),
        ((LayerGroup.full((0,)),), (), "each with the layers that are in it and their kv"),
        ((LayerGroup.full((1,), SMALL),), (), r"name the layers \[1\]; they must name each of 0..0 once"),
        ((LayerGroup.full((0, 0), SMALL),), (), r"name the layers \[0, 0\]; they must name each of 0..1 once"),
        ((LayerGroup.full((0,), SMALL),), ((0, 0),), r"name the layers \[0, 0\]"),
        ((LayerGroup.full((1,), SMALL),), ((0, 1),), r"has \(0, 1\); layer 0 must read an earlier layer"),
        (
            (LayerGroup.full((0,), SMALL),),
            ((1, 0), (2, 1)),
            r"has \(2, 1\); layer 2 must read an earlier layer, one of",
        ),
    ],
)
def test_layers_that_do_not_fit_together_are_refused(groups, shared, message):
    with pytest.raises(ValueError, match=message):
        CacheSpec(groups=groups, shared_layers=shared)
