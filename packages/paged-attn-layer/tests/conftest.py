"""Eight CPU devices, for the tests that shard; must come before anything asks for a device."""

import signal
from collections.abc import Iterator

import jax
import pytest
from jax_settings import strict_promotion  # noqa: F401 - a fixture for all tests here

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(autouse=True)
def ctrl_c_interrupts() -> Iterator[None]:
    """Python's own handler of Ctrl-C, whatever a test leaves; a shell starts programs in the background without one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
