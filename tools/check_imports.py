"""Checks that each package imports only its declared dependencies, and only public names of the layers below it.

    python tools/check_imports.py

Reads the source of every package and runs none of it. Prints each wrong import as `file:line: why`, and then exits
with 1.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAYERS = ("paged_kernels", "paged_cache", "paged_attn_layer")
"""Bottom first. Each package may import those before it."""
THIRD_PARTY = {
    "paged_kernels": {"jax", "jaxtyping", "numpy"},
    "paged_cache": {"jax", "jaxtyping", "numpy", "safetensors"},
    "paged_attn_layer": {
        *("jax", "jaxtyping", "numpy", "flax", "eformer", "ml_dtypes"),
        *("transformers", "tokenizers", "safetensors", "gguf", "tqdm", "matplotlib", "orbax", "tensorstore"),
        "paged_generate",  # the entries of its commands are modules of their own
    },
}
"""Distributions that each package may import, besides itself, the standard library and the layers below."""


def imports(tree: ast.AST) -> Iterator[tuple[int, str, list[str]]]:
    """Yields each import in `tree`: line, module and imported names (none for `import module`)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or ""), [alias.name for alias in node.names]


def public_names(module: str) -> set[str]:
    """Returns the names in `__all__` of a package, or of a module beside its `__init__`; none for any other module."""
    package, *inner = module.split(".")
    source = ROOT / "packages" / package.replace("_", "-") / "src" / package
    path = source / f"{inner[0] if inner else '__init__'}.py"
    if len(inner) > 1 or not path.exists():
        return set()
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign | ast.AugAssign):
            target = node.target if isinstance(node, ast.AugAssign) else node.targets[0]
            names |= set(ast.literal_eval(node.value)) if ast.unparse(target) == "__all__" else set()
    return names


def breach(package: str, module: str, names: list[str]) -> str | None:
    """Returns why `package` must not import `names` from `module`, or None if it may."""
    top = module.split(".", maxsplit=1)[0]
    if top in LAYERS and top != package:
        if LAYERS.index(top) > LAYERS.index(package):
            return f"{package} is below {top} and must not import it"
        public = public_names(module)
        if module != top and not public:
            return f"{module} is private to {top}; import from {top}"
        private = set(names) - public
        return f"{', '.join(sorted(private))} is not in {module}.__all__" if private else None
    if module.startswith("."):
        return "relative import; write the module's full name"
    if top == package or top in sys.stdlib_module_names or top in THIRD_PARTY[package]:
        return None
    return f"{top} is not a dependency of {package}"


def main() -> int:
    """Print each wrong import. Returns the exit status: 1 if there is any."""
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
