"""Eight CPU devices, for tests that shard. Must come before anything uses a device."""

from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(autouse=True, scope="module")
def forget_compilations() -> Iterator[None]:
    """Each executable holds memory maps. A process may have about 65 thousand; with more, XLA's compiler crashes."""
    yield
    jax.clear_caches()
