"""Checks built wheels: their contents, and that each installs with only the layers below it.

    python -m build --outdir dist packages/paged-kernels   # and the others
    pip wheel --no-deps --wheel-dir dist packages/paged-kernels-cpu   # where there is a compiler
    python tools/check_release.py --dist dist

Each wheel must have the version of `_version.py`, the licence, and every file of the sources, with data and `py.typed`.
It must have no tests. The changelog must have an entry of that version. Then the wheels are installed into one fresh
environment, layer by layer. Each must import there, and must not bring distributions that belong to a layer above.
If there is a wheel of the CPU kernels, it must hold the shared library and be for any Python 3. The backend `cpu` must
run after it is installed beside `paged-kernels`, as `xla` must before.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAYERS = ("paged-kernels", "paged-cache", "paged-attn-layer")
NOT_YET = {"paged-kernels": ("flax", "eformer", "torch"), "paged-cache": ("flax", "eformer", "torch")}
NOT_YET["paged-attn-layer"] = ("torch", "transformers", "vllm")
"""Distributions that a package, installed with those below it, must not bring."""
CPU_KERNELS = "paged-kernels-cpu"
LIBRARY = "paged_kernels_cpu/libpaged_kernels_cpu.so"
WHICH_BACKEND = """
import jax.numpy as jnp
from paged_kernels import AttentionSpec, KVPages, RaggedBatch, explain_backends
pages = KVPages.zeros(num_pages=4, page_size=8, num_kv_heads=1, head_dim=8)
batch = RaggedBatch.from_lists([[1]], [3], [1])
print(explain_backends(jnp.zeros((1, 1, 8)), pages, batch, AttentionSpec()).runs)
"""
"""A program that prints the backend that attention runs on."""


def version_of(name: str) -> str:
    """Returns the version in the package's `_version.py`."""
    module = name.replace("-", "_")
    source = (ROOT / "packages" / name / "src" / module / "_version.py").read_text()
    found = re.search(r'__version__ = "(.+)"', source)
    if found is None:
        sys.exit(f"{name}: no __version__ in _version.py")
    return found[1]


def problems_of_wheel(name: str, wheel: Path) -> list[str]:
    """Returns the problems of a wheel's contents and of the package's changelog."""
    module = name.replace("-", "_")
    files = zipfile.ZipFile(wheel).namelist()
    found, ours = [], files_of(name)
    if missing := ours - set(files):
        found.append(f"the wheel lacks {', '.join(sorted(missing)[:3])}")
    if not any(file.endswith("licenses/LICENSE") for file in files):
        found.append("the wheel lacks the licence")
    if name == CPU_KERNELS:
        ours.add(LIBRARY)
        found += [] if LIBRARY in files else [f"the wheel lacks {LIBRARY}"]
    if strangers := [file for file in files if file not in ours and not file.startswith(f"{module}-")]:
        found.append(f"the wheel carries {', '.join(strangers[:3])}")
    if f"## {version_of(name)}" not in (ROOT / "packages" / name / "CHANGELOG.md").read_text():
        found.append(f"CHANGELOG.md has no entry for {version_of(name)}")
    return [f"{name}: {problem}" for problem in found]


def files_of(name: str) -> set[str]:
    """Returns the paths of a package's source files, as a wheel names them."""
    source = ROOT / "packages" / name / "src"
    files = (path for path in source.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(source).as_posix() for path in files if ".egg-info" not in str(path)}


def problems_of_install(name: str, dist: Path, python: Path) -> list[str]:
    """Install the wheel into the environment of `python`. Returns the problems found after it."""
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    constraints = ROOT / "constraints" / "tested.txt"
    wheel = find_wheel(name, dist)
    subprocess.run([*pip, "install", "-q", "--find-links", dist, "-c", constraints, wheel], check=True)
    subprocess.run([str(python), "-W", "ignore", "-c", f"import {name.replace('-', '_')}"], check=True, cwd=dist)
    subprocess.run([*pip, "check"], check=True)
    listed = subprocess.run([*pip, "list", "--format=freeze"], check=True, capture_output=True, text=True).stdout
    installed = {line.split("==")[0].lower() for line in listed.splitlines()}
    return [f"{name}: installing it brought {stranger}" for stranger in NOT_YET[name] if stranger in installed]


def problems_of_cpu_kernels(dist: Path, python: Path) -> list[str]:
    """Install the CPU kernels beside `paged-kernels`. Returns the problems found before and after it."""
    found = []
    for runs in ("xla", "cpu"):
        if runs == "cpu":
            pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
            subprocess.run([*pip, "install", "-q", *cpu_wheels(dist)], check=True)
        program = [str(python), "-W", "ignore", "-c", WHICH_BACKEND]
        printed = subprocess.run(program, check=True, cwd=dist, capture_output=True, text=True).stdout.strip()
        found += [] if printed == runs else [f"{CPU_KERNELS}: attention runs on {printed}, and must on {runs}"]
    return found


def cpu_wheels(dist: Path) -> list[Path]:
    """Returns the wheel of the CPU kernels for any Python 3 on this platform, in a list; an empty one without it."""
    return list(dist.glob(f"paged_kernels_cpu-{version_of(CPU_KERNELS)}-py3-none-*.whl"))


def find_wheel(name: str, dist: Path) -> Path:
    """Returns the path of the wheel of a package's current version in `dist`."""
    wheel = dist / f"{name.replace('-', '_')}-{version_of(name)}-py3-none-any.whl"
    if not wheel.exists():
        sys.exit(f"{wheel.name} is not in {dist}; build it first: python -m build --outdir {dist} packages/{name}")
    return wheel


def main() -> int:
    """Print each problem. Returns the exit status: 1 if there is any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dist", type=Path, required=True, help="folder that holds the wheels")
    dist = parser.parse_args().dist.resolve()
    found = [problem for name in LAYERS for problem in problems_of_wheel(name, find_wheel(name, dist))]
    found += [problem for wheel in cpu_wheels(dist) for problem in problems_of_wheel(CPU_KERNELS, wheel)]
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / ("Scripts" if sys.platform == "win32" else "bin") / "python"
        for name in LAYERS:
            print(f"installing {name} {version_of(name)} on top of the layers below", flush=True)
            found += problems_of_install(name, dist, python)
        if cpu_wheels(dist):
            print(f"installing {CPU_KERNELS} {version_of(CPU_KERNELS)} beside paged-kernels", flush=True)
            found += problems_of_cpu_kernels(dist, python)
        else:
            print(f"{CPU_KERNELS}: no wheel in {dist}; it is not checked")
    print("\n".join(found) or "all wheels are correct")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
