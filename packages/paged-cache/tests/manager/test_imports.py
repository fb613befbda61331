import ast
import pathlib
import sys

import paged_cache._src.manager

SOURCES = sorted(pathlib.Path(paged_cache._src.manager.__file__).parent.glob("*.py"))


def test_the_bookkeeping_needs_numpy_and_nothing_else():
    allowed = {*sys.stdlib_module_names, "numpy"}
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            foreign = [
                n for n in names if n.split(".")[0] not in allowed and not n.startswith("paged_cache._src.manager")
            ]
            assert not foreign, f"{source.name} imports {foreign}"
