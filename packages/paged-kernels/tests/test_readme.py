"""The README's examples print what they say, and its table is what the backends answer."""

import doctest
import pathlib

from cpu_targets import needs_library
from support_table import make_table

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_examples():
    results = doctest.testfile(str(README), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert results.attempted >= 9
    assert results.failed == 0


@needs_library
def test_support_table_is_what_the_backends_answer():
    """If this fails, run `python packages/paged-kernels/tests/support/support_table.py` and paste its table."""
    text = README.read_text()
    table = text.split("<!-- support table -->\n")[1].split("\n<!-- end of support table -->")[0]
    assert table == make_table()
