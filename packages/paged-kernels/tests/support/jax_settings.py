"""The settings of jax that careful projects switch on, for the tests of all packages."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
import pytest


@pytest.fixture(autouse=True, scope="module")
def strict_promotion() -> Iterator[None]:
    """No test promotes ranks or types implicitly, as careful projects demand. A conftest imports it to switch it on."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


@contextlib.contextmanager
def debug_each_operation() -> Iterator[None]:
    """How jax searches for a NaN: it runs each operation alone. Ours must not make one for a moment."""
    with jax.disable_jit(), jax.debug_nans(True):
        yield


SETTINGS = {
    "enable_x64": lambda: jax.enable_x64(True),
    "debug_nans": lambda: jax.debug_nans(True),
    "check_tracer_leaks": jax.checking_leaks,
    "disable_jit": debug_each_operation,
}


def assert_same(results: object, expected: object, *, rtol: float, atol: float) -> None:
    """Equal structures, texts, shapes and types, and numbers that are equal up to rounding."""
    assert jax.tree.structure(results) == jax.tree.structure(expected)
    for array, want in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        if isinstance(want, str):
            assert array == want
            continue
        assert (array.shape, array.dtype) == (want.shape, want.dtype)
        np.testing.assert_allclose(np.asarray(array, np.float64), np.asarray(want, np.float64), rtol=rtol, atol=atol)
