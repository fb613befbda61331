"""The tests catch faults of the C++ kernels: each edit of a source here makes one of the tests fail.

The edited sources are compiled for the portable target, and the tests run with that library in a process of their own.
"""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from cpu_targets import needs_library

TESTS = Path(__file__).parents[1]
PACKAGE = TESTS.parents[1] / "paged-kernels-cpu"
CORE = ("attention", "kernels", "scratch", "softmax", "threads", "work_list", "write", "targets/portable", "ffi")

pytestmark = [
    pytest.mark.slow,
    needs_library,
    pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler"),
]


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One edit of a source, and the tests that must see it."""

    file: str
    old: str
    """Text that occurs exactly once in the file."""
    new: str
    tests: str = "attention/cpu/test_attend.py"


MUTANTS = {
    "window_one_too_wide": Mutant("mask.h", "t - spec.sliding_window + 1", "t - spec.sliding_window"),
    "causal_one_too_few": Mutant("mask.h", "std::min(seq.kv_len, t + 1)", "std::min(seq.kv_len, t)"),
    "tree_bit_of_the_next_token": Mutant("mask.h", ">> (token % 32)", ">> ((token + 1) % 32)"),
    "first_chunk_is_lost": Mutant("attention.cpp", "int64_t part = 1; part", "int64_t part = 2; part"),
    "no_decay_of_the_total": Mutant("softmax.cpp", "state.total[row] * scale", "state.total[row]"),
    "sink_of_the_first_head": Mutant("softmax.cpp", "call.sinks[to.head]", "call.sinks[0]"),
    "alibi_backwards": Mutant("logits.h", "- slope * T::to_floats", "+ slope * T::to_floats"),
    "value_scale_of_the_key": Mutant("entries.h", "slot : pages.page_size + slot]", "slot : slot]"),
    "slot_of_the_next_row": Mutant(
        "write.cpp", "slot = call.slots[row]", "slot = call.slots[row] ^ 1", "page_write/cpu/test_write.py"
    ),
    "nibbles_swapped": Mutant("write.cpp", "if (lane < half)", "if (lane >= half)", "page_write/cpu/test_write.py"),
}


def build(mutant: Mutant, folder: Path) -> None:
    """Compiles the mutant as a package `paged_kernels_cpu` in the folder."""
    cpp, package = folder / "cpp", folder / "paged_kernels_cpu"
    shutil.copytree(PACKAGE / "cpp", cpp)
    shutil.copytree(PACKAGE / "src" / "paged_kernels_cpu", package)
    source = (cpp / mutant.file).read_text()
    assert source.count(mutant.old) == 1, f"{mutant.old!r} must occur once in {mutant.file}"
    (cpp / mutant.file).write_text(source.replace(mutant.old, mutant.new))
    library = str(package / "libpaged_kernels_cpu.so")
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-pthread", "-w", f"-I{jax.ffi.include_dir()}"]
    subprocess.run(["c++", *flags, *(f"{cpp}/{name}.cpp" for name in CORE), "-o", library], check=True)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_is_seen(name, tmp_path):
    mutant = MUTANTS[name]
    build(mutant, tmp_path)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow"]
    run = [sys.executable, "-m", "pytest", *options, str(TESTS / mutant.tests)]
    done = subprocess.run(
        run, env={**os.environ, "PYTHONPATH": path}, cwd=TESTS.parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout
