"""Times calls on the TPU that is attached. It has never run on one: no TPU was at hand when this was written.

    python -m tpu_costing.timing '{"workload": NAME, "contestant": {...}}'

Each call is timed in a process of its own, since a kernel that does not compile may take its process along. Whoever
asks must leave the TPU to that process, so only functions that run in it use jax's devices.
"""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from paged_kernels._src.tpu.chip import Chip
from tpu_costing.calls import Call, Contestant, make_call
from tpu_costing.child_process import answer, ask
from tpu_costing.workloads import Workload

CALLS = 20
"""Calls that are sent off together, so that the host's share is hidden."""
TURNS = 7
"""Times that this is done; the median counts."""


def ask_chip() -> str:
    """The name of the attached TPU.

    Raises:
        ChildError: there is none.
    """
    return ask("timing", {})["chip"]


def ask_microseconds(workload: Workload, contestant: Contestant) -> float:
    """Time of one call of the workload's larger batch.

    Raises:
        ChildError: it does not compile, or no TPU is attached.
    """
    order = {"workload": workload.name, "contestant": dataclasses.asdict(contestant)}
    return ask("timing", order)["microseconds"]


def main() -> None:
    """Answer with the chip's name and, where a workload is asked for, its time."""
    order = json.loads(sys.argv[1])
    said: dict[str, Any] = {"chip": attached_chip()}
    if order:
        workload = Workload.parse(order["workload"])
        call = make_call(workload, Contestant(**order["contestant"]), len(workload.batches) - 1)
        said["microseconds"] = time_call(call)
    answer(said)


def attached_chip() -> str:
    """The name of the TPU that jax runs on.

    Raises:
        RuntimeError: it runs on none.
    """
    if jax.default_backend() != "tpu":
        raise RuntimeError(f"jax runs on {jax.default_backend()!r}, but --time needs an attached TPU; leave it out")
    return Chip.from_device_kind(jax.devices()[0].device_kind).name


def time_call(call: Call) -> float:
    """Microseconds of one call, the median over turns of calls in a row."""
    compiled = jax.jit(call.function, donate_argnums=call.donate)
    integers = jax.tree.map(jnp.asarray, call.integers)
    arrays = [jax.tree.map(_random, shapes) for shapes in call.shapes]

    def run() -> Any:
        out = compiled(integers, *arrays)
        if call.donate:  # the pages were given away, and came back
            arrays[0] = out
        return out

    return _median_seconds(run) * 1e6


def _median_seconds(run: Callable[[], Any]) -> float:
    jax.block_until_ready(run())
    taken = []
    for _ in range(TURNS):
        start = time.perf_counter()
        out = [run() for _ in range(CALLS)][-1]
        jax.block_until_ready(out)
        taken.append((time.perf_counter() - start) / CALLS)
    return statistics.median(taken)


def _random(shape: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape.shape, jnp.bfloat16).astype(shape.dtype)


if __name__ == "__main__":
    main()
