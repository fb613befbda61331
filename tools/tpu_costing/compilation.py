"""Compiles one call for one chip, in its own process. libtpu reads its flags only once, and may abort at the end.

    python -m tpu_costing.compilation '{"workload": NAME, "chip": NAME, "batch": N, "contestant": {...}}'

The last line of the output is a JSON object with facts that the compiler's dumps do not contain.
"""

import json
import re
import sys

import jax
from jax.experimental import topologies

from tpu_costing.calls import Contestant, make_call
from tpu_costing.child_process import answer
from tpu_costing.chips import LIMITS
from tpu_costing.constants import KERNEL, KnownScalars
from tpu_costing.workloads import Workload

_KERNEL_VMEM = re.compile(
    rf'{KERNEL}.*used_scoped_memory_configs":\[{{"memory_space":"1","offset":"\d+","size":"(\d+)"'
)


def main() -> None:
    """Compile the call of the command line."""
    order = json.loads(sys.argv[1])
    device = topologies.get_topology_desc(platform="tpu", topology_name=LIMITS[order["chip"]].topology).devices[0]
    call = make_call(Workload.parse(order["workload"]), Contestant(**order["contestant"]), order["batch"])
    cpu_devices = jax.devices
    jax.devices = lambda *backend: cpu_devices(*backend) if backend else [device]  # jax's kernels find the chip by it
    known = KnownScalars(call.function, call.integers, call.shapes, device)
    sharding = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), (call.integers, *call.shapes)
    )
    with known.stored(call.page_table), jax.default_device(device):
        compiled = jax.jit(call.function, donate_argnums=call.donate).lower(*arguments).compile()
    answer({"stores": known.stores, "vmem_bytes": vmem_bytes(compiled)})


def vmem_bytes(compiled: jax.stages.Compiled) -> int | None:
    """Returns the bytes of VMEM that the compiler gave the kernel. None if it cannot print the program."""
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:
        return None
    return max(map(int, _KERNEL_VMEM.findall(text or "")), default=None)


if __name__ == "__main__":
    main()
