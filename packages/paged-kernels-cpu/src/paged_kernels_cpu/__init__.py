"""The compiled CPU kernels of `paged-kernels`, which finds and loads them: this package is only their place."""

from pathlib import Path

from paged_kernels_cpu._version import __version__

__all__ = ["__version__", "library_path"]


def library_path() -> Path:
    """Returns the path of the compiled library. It uses no Python, and defines FFI calls for XLA."""
    return Path(__file__).with_name("libpaged_kernels_cpu.so")
