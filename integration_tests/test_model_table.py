"""The README's table of model families is what the registry and the tests say."""

import pathlib

from model_table import make_table, untested_types

README = pathlib.Path(__file__).parents[1] / "packages/paged-attn-layer/README.md"


def test_the_readme_has_the_table():
    """If this fails, run `python integration_tests/support/model_table.py` and paste its table."""
    assert make_table() in README.read_text()


def test_every_model_type_is_compared_with_transformers():
    """If this fails, add a case to `integration_tests/support/family_cases.py`."""
    assert untested_types() == []
