"""Eight CPU devices, for the tests that shard; must come before anything asks for a device."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
