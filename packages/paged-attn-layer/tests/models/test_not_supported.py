import pytest
from tiny_checkpoints import CONFIG

from paged_attn_layer import read_config
from paged_attn_layer._src.models.not_supported import MISSING
from paged_attn_layer._src.models.registry import FAMILIES

NAMES = [(name, need) for need, names in MISSING.items() for name in names]


@pytest.mark.parametrize(("name", "need"), NAMES)
def test_a_known_architecture_is_refused_with_what_it_needs(name, need):
    with pytest.raises(NotImplementedError, match=f"'{name}' is not supported: it needs {need}; supported are"):
        read_config({**CONFIG, "architectures": [name]})


def test_each_is_named_once_and_is_no_family():
    names = [name for name, _ in NAMES]
    assert len({*names}) == len(names)
    assert not {*names} & {name for family in FAMILIES for name in family.architectures}
