"""How far the memory of the host rises while a checkpoint of more than 2 GB is read.

A process of its own reads each weight, places it on its device, and drops it. On the CPU a placed weight is host memory
too, so one weight counts beside what reading takes. The figure is the kernel's: the most that was resident.
"""

import subprocess
import sys

import ml_dtypes
import pytest
from large_checkpoint import write_large

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how high a process's memory was"),
]

READ = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh
from paged_attn_layer._src.convert.load import match_checkpoint, open_checkpoint
from paged_attn_layer._src.convert.place import place
from paged_attn_layer._src.convert.progress import HostMemory
path, devices = sys.argv[1], int(sys.argv[2])
jax.config.update("jax_num_cpu_devices", devices)
mesh = Mesh(np.array(jax.devices()), ("tp",)) if devices > 1 else None
jax.block_until_ready(jnp.ones(3) + 1)
memory = HostMemory()
matched = match_checkpoint(open_checkpoint(path), jnp.bfloat16)
for name, weight in matched.weights():
    jax.block_until_ready(place(weight, jnp.bfloat16, matched.sharding(name, mesh, None)))
print(memory.rise())
"""
CONVERT = """
import sys
from paged_attn_layer import convert_checkpoint
print(convert_checkpoint(sys.argv[1], sys.argv[1] + "-new").host_memory)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    directory = tmp_path_factory.mktemp("large")
    total, largest = write_large(directory, ml_dtypes.bfloat16)
    assert total > 2 << 30
    return directory, largest


@pytest.mark.parametrize(("code", "devices"), [(READ, 1), (READ, 4), (CONVERT, 1)], ids=["load", "mesh", "convert"])
def test_the_host_holds_one_weight(large, code, devices):
    directory, largest = large
    command = [sys.executable, "-c", code, str(directory), str(devices)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rise = int(done.stdout)
    assert rise < 1.3 * largest + 500e6
    assert rise > 0.2 * largest, "the figure is of this process"
