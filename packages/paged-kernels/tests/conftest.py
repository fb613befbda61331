"""Eight CPU devices, for tests that shard. Must come before anything uses a device."""

from collections.abc import Iterator

import jax
import pytest
from jax_settings import strict_promotion  # noqa: F401 - a fixture for all tests here

jax.config.update("jax_num_cpu_devices", 8)


INTERPRETED_ON_EVERY_PYTHON = ("tpu/test_launch.py", "test_update.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Interpreted kernels take long. Most run `once`; those of these files show each jax version that they work."""
    for item in items:
        if "tpu_interpret" in item.nodeid and not item.nodeid.partition("::")[0].endswith(INTERPRETED_ON_EVERY_PYTHON):
            item.add_marker(pytest.mark.once)


@pytest.fixture(autouse=True, scope="module")
def forget_compilations() -> Iterator[None]:
    """Each executable holds memory maps. A process may have about 65 thousand; with more, XLA's compiler crashes."""
    yield
    jax.clear_caches()
