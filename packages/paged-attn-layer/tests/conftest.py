"""Eight CPU devices, for the tests that shard; must come before anything asks for a device."""

from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(autouse=True, scope="module")
def strict_promotion() -> Iterator[None]:
    """No test promotes ranks or types implicitly, as careful projects demand of their libraries."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield
