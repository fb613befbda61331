"""Eight CPU devices, for the tests that shard; must come before anything asks for a device."""

from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(autouse=True, scope="module")
def forget_compilations() -> Iterator[None]:
    """Each executable holds memory maps, of which a process may have some 65 thousand; then XLA's compiler crashes."""
    yield
    jax.clear_caches()
