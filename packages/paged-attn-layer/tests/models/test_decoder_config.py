import dataclasses

import pytest
from tiny_checkpoints import CONFIG

from paged_attn_layer import read_config

TINY = read_config(CONFIG)
LAYER = TINY.layers[0]


def changed(layer=LAYER, **attention):
    return dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, **attention))


def test_equal_layers_are_equal_values():
    assert len(set(TINY.layers)) == 1
    assert hash(TINY) == hash(read_config(CONFIG))


def test_layers_that_share_keys_have_no_views_of_their_own():
    layers = (LAYER, changed(sliding_window=8), changed(stores_kv=False))
    spec = dataclasses.replace(TINY, layers=layers, shared_layers=((2, 0),)).cache_spec
    assert [(group.kind, group.layers) for group in spec.groups] == [("full", (0,)), ("window", (1,))]
    assert [place.writes for place in spec.places()] == [True, True, False]


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"vocab_size": 0}, "vocab_size=0 must be a whole number of at least 1"),
        ({"layers": ()}, "layers is empty"),
        ({"hidden_size": 8}, r"layers\[0\].attention.hidden_size=16 must be hidden_size=8"),
        ({"shared_layers": ((1, 0),)}, r"shared_layers=.* must name the layers with stores_kv=False: \[\]"),
        ({"layers": (LAYER, changed(stores_kv=False))}, r"must name the layers with stores_kv=False: \[1\]"),
    ],
)
def test_what_does_not_fit_is_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(TINY, **fields)


def test_attention_and_mlp_are_of_one_size():
    with pytest.raises(ValueError, match=r"attention.hidden_size=8 must be mlp.hidden_size=16"):
        changed(hidden_size=8)
