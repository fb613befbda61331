"""Finds the compiled library, checks that this jaxlib can run it, and registers its calls with XLA."""

import ctypes
import functools
import importlib
import re
from pathlib import Path
from typing import Any

import jax

MODULE = "paged_kernels_cpu"
INSTALL = "pip install paged-kernels-cpu"
ATTENTION = "paged_attention_cpu"
WRITE = "paged_write_cpu"
"""The names of the calls in XLA, and of the functions in the library without `_cpu`."""


@functools.cache
def load() -> ctypes.CDLL:
    """Returns the library. Its calls are registered from then on.

    Raises:
        NotImplementedError: it is not installed, or this jaxlib cannot run it. The message says what to do.
    """
    library = _open()
    _check_ffi_version((library.paged_ffi_major(), library.paged_ffi_minor()), runtime_ffi_version())
    for name in (ATTENTION, WRITE):
        function = getattr(library, name.removesuffix("_cpu"))
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(function), platform="cpu")
    return library


def targets() -> tuple[str, ...]:
    """Returns the instruction sets for which the library has kernels that this processor can run, best first.

    Raises:
        NotImplementedError: see `load`.
    """
    names = load().paged_targets
    names.restype = ctypes.c_char_p
    return tuple(names().decode().split(","))


def _open() -> ctypes.CDLL:
    try:
        package: Any = importlib.import_module(MODULE)
    except ModuleNotFoundError as error:
        if error.name != MODULE:
            raise
        raise NotImplementedError(f"paged-kernels-cpu is not installed: {INSTALL}; until then xla serves") from None
    try:
        return ctypes.CDLL(str(package.library_path()))
    except OSError as error:
        raise NotImplementedError(
            f"the library of paged-kernels-cpu does not load ({error}); install it again: {INSTALL} --force-reinstall"
        ) from None


def runtime_ffi_version() -> tuple[int, int]:
    """Returns the version of this jaxlib's FFI, from its headers: jaxlib tells it nowhere else."""
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text(encoding="utf-8")
    major, minor = (re.search(rf"#define XLA_FFI_API_{part} (\d+)", header) for part in ("MAJOR", "MINOR"))
    if major is None or minor is None:
        raise NotImplementedError("this jaxlib's FFI headers tell no version; use backend='xla'")
    return int(major[1]), int(minor[1])


def _check_ffi_version(compiled: tuple[int, int], runtime: tuple[int, int]) -> None:
    """XLA takes versions up to its own. A later one would stop all of jax's CPU backend, not only these calls."""
    if compiled > runtime or compiled[0] != runtime[0]:
        raise NotImplementedError(
            f"paged-kernels-cpu was built for XLA FFI {_dotted(compiled)}, but this jaxlib has {_dotted(runtime)}; "
            "build it with this jaxlib's headers, or use backend='xla'"
        )


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
