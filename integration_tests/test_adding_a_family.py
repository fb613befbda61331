"""The code of docs/models/adding-a-family.md is that of the family that it adds."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs/models/adding-a-family.md"
SOURCES = (
    ROOT / "packages/paged-attn-layer/src/paged_attn_layer/_src/models/olmo2.py",
    ROOT / "packages/paged-cache/src/paged_cache/_src/spec/model_types.py",
    ROOT / "integration_tests/support/family_cases.py",
)


def test_its_code_is_in_the_sources():
    """If this fails, copy the changed lines to the page."""
    sources = [path.read_text(encoding="utf-8") for path in SOURCES]
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 5
    assert [block for block in blocks if not any(block in source for source in sources)] == []


def test_its_links_are_there():
    links = re.findall(r"\]\((\.\.[^)]+)\)", PAGE.read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (PAGE.parent / link).exists()] == []
