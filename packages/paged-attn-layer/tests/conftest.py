"""Eight CPU devices, for the tests that shard; must come before anything asks for a device."""

import jax
from jax_settings import strict_promotion  # noqa: F401 - a fixture for all tests here

jax.config.update("jax_num_cpu_devices", 8)
