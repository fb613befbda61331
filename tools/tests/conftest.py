"""The tools' tests run under jax's strict promotion, as those of the packages do."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def strict_promotion() -> Iterator[None]:
    """No test promotes ranks or types implicitly."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield
