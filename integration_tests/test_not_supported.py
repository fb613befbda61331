"""The architectures that are refused by name are ones that transformers has."""

import transformers

from paged_attn_layer._src.models.not_supported import MISSING


def test_names_are_transformers():
    names = [name for names in MISSING.values() for name in names]
    assert [name for name in names if not hasattr(transformers, name)] == []
