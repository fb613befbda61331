"""Check that each package imports only what it declares, and of the layers below it only public names.

    python tools/check_imports.py

Reads the source of every package; runs none of it. Prints each breach as `file:line: what` and exits with 1.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAYERS = ("paged_kernels", "paged_cache", "paged_attn_layer")
"""Bottom first: each may import those before it."""
THIRD_PARTY = {
    "paged_kernels": {"jax", "jaxtyping", "numpy"},
    "paged_cache": {"jax", "jaxtyping", "numpy", "safetensors"},
    "paged_attn_layer": {
        *("jax", "jaxtyping", "numpy", "flax", "eformer", "ml_dtypes"),
        *("transformers", "tokenizers", "safetensors", "gguf", "tqdm", "matplotlib"),
    },
}
"""What each package may import besides itself, the standard library and the layers below."""


def imports(tree: ast.AST) -> Iterator[tuple[int, str, list[str]]]:
    """Every import in `tree` as line, module and the names taken from it (none for `import module`)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or ""), [alias.name for alias in node.names]


def public_names(package: str) -> set[str]:
    """The names in `__all__` of a package, whose lists may be several."""
    source = (ROOT / "packages" / package.replace("_", "-") / "src" / package / "__init__.py").read_text()
    names = set()
    for node in ast.parse(source).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(node, ast.Assign | ast.AugAssign) and target is not None and ast.unparse(target) == "__all__":
            names |= set(ast.literal_eval(node.value))
    return names


def breach(package: str, module: str, names: list[str]) -> str | None:
    """What is wrong with `package` importing `names` from `module`, if anything."""
    top = module.split(".", maxsplit=1)[0]
    if top in LAYERS and top != package:
        if LAYERS.index(top) > LAYERS.index(package):
            return f"{package} is below {top} and must not import it"
        if module != top:
            return f"import from {top} itself, not from {module}, which is private to it"
        private = set(names) - public_names(top)
        return f"{', '.join(sorted(private))} is not in {top}.__all__" if private else None
    if module.startswith("."):
        return "relative import; name the module in full"
    if top == package or top in sys.stdlib_module_names or top in THIRD_PARTY[package]:
        return None
    return f"{top} is not a dependency of {package}"


def main() -> int:
    """Print every breach; the exit status says whether there is one."""
    found = 0
    for package in LAYERS:
        for path in sorted((ROOT / "packages" / package.replace("_", "-") / "src").rglob("*.py")):
            for line, module, names in imports(ast.parse(path.read_text())):
                if message := breach(package, module, names):
                    print(f"{path.relative_to(ROOT)}:{line}: {message}")
                    found += 1
    print(f"{found} import{'s' * (found != 1)} against the rules of the layers")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
