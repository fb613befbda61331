"""Times calls on the attached TPU. This has never been run on a TPU.

    python -m tpu_costing.timing '{"workload": NAME, "contestant": {...}}'

Each call is timed in its own process, because a kernel that does not compile may end its process. The process that asks
must not use the TPU. So the `ask_*` functions do not touch jax's devices.
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
"""Calls dispatched in a row, so that the host's time is hidden."""
TURNS = 7
"""Number of such rounds. The median counts."""


def ask_chip() -> str:
    """Returns the name of the attached TPU.

    Raises:
        ChildError: no TPU is attached.
    """
    return ask("timing", {})["chip"]


def ask_microseconds(workload: Workload, contestant: Contestant) -> float:
    """Returns the time of one call of the workload's larger batch.

    Raises:
        ChildError: the call does not compile, or no TPU is attached.
    """
    order = {"workload": workload.name, "contestant": dataclasses.asdict(contestant)}
    return ask("timing", order)["microseconds"]


def main() -> None:
    """Answer with the chip's name and, if a workload is given, its time."""
    order = json.loads(sys.argv[1])
    said: dict[str, Any] = {"chip": attached_chip()}
    if order:
        workload = Workload.parse(order["workload"])
        call = make_call(workload, Contestant(**order["contestant"]), len(workload.batches) - 1)
        said["microseconds"] = time_call(call)
    answer(said)


def attached_chip() -> str:
    """Returns the name of the TPU that jax runs on.

    Raises:
        RuntimeError: jax does not run on a TPU.
    """
    if jax.default_backend() != "tpu":
        raise RuntimeError(f"jax runs on {jax.default_backend()!r}, but --time needs an attached TPU; leave it out")
    return Chip.from_device_kind(jax.devices()[0].device_kind).name


def time_call(call: Call) -> float:
    """Returns the microseconds of one call: the median over rounds of `CALLS` calls."""
    compiled = jax.jit(call.function, donate_argnums=call.donate)
    integers = jax.tree.map(jnp.asarray, call.integers)
    arrays = [jax.tree.map(_random, shapes) for shapes in call.shapes]

    def run() -> Any:
        out = compiled(integers, *arrays)
        if call.donate:  # the pages were donated; the call returned them
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
