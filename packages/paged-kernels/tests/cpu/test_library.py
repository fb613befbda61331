"""The compiled library is found and checked before XLA hears of it; without it, `xla` serves and says why."""

import ctypes
import sys

import pytest
from cpu_targets import TARGETS, needs_library
from kernel_data import SPECS, WORKLOADS, make_case

from paged_kernels import explain_backends, paged_attention
from paged_kernels._src.cpu import library


@pytest.fixture
def not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, library.MODULE, None)
    monkeypatch.setattr(library, "load", library.load.__wrapped__)


@needs_library
def test_targets_end_with_the_portable_one():
    assert TARGETS[-1] == "portable"
    assert set(TARGETS) <= {"avx512", "avx2", "portable"}


def test_without_the_library_xla_serves_and_says_why(not_installed):
    case = make_case(WORKLOADS["decode"])
    report = explain_backends(case.q, case.pages, case.batch, SPECS["plain"])
    assert report.runs == "xla"
    assert (
        report.why_not["cpu"]
        == "paged-kernels-cpu is not installed: pip install paged-kernels-cpu; until then xla serves"
    )
    paged_attention(case.q, case.pages, case.batch, SPECS["plain"])
    with pytest.raises(NotImplementedError, match="paged-kernels-cpu is not installed: pip install"):
        paged_attention(case.q, case.pages, case.batch, SPECS["plain"], backend="cpu")


@needs_library
def test_a_file_that_does_not_load_says_what_to_do(monkeypatch, tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(sys.modules[library.MODULE], "library_path", lambda: broken)
    with pytest.raises(NotImplementedError, match=r"does not load \(.*broken.so.*\); install it again: pip install"):
        library.load.__wrapped__()


def test_this_jaxlib_has_an_ffi_version():
    major, minor = library.runtime_ffi_version()
    assert (major, minor) >= (0, 3)


@pytest.mark.parametrize(("compiled", "runtime"), [((0, 4), (0, 3)), ((1, 0), (0, 3)), ((0, 3), (1, 0))])
def test_a_library_for_another_ffi_is_refused_before_xla_hears_of_it(compiled, runtime):
    with pytest.raises(NotImplementedError, match=r"built for XLA FFI .*, but this jaxlib has .*; build it with"):
        library._check_ffi_version(compiled, runtime)


def test_an_older_ffi_is_taken():
    library._check_ffi_version((0, 3), (0, 5))


@needs_library
def test_the_library_is_opened_once():
    assert library.load() is library.load()
    assert isinstance(library.load(), ctypes.CDLL)
