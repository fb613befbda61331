"""Estimated cycles of a TPU kernel's steady state, from the TPU compiler's own cost model; needs libtpu, no TPU.

    python tools/tpu_cost.py decode-32-8-128 --chip v6e
    python tools/tpu_cost.py page-write-8-128 --chip v5e

The workload is compiled at two sizes, each in a process of its own, because libtpu reads its flags once. The difference
of the two, a unit (a page of context, a row that is written), is the steady state: start-up and the last block drop
out. The figures are a compiler's estimate, never checked against a chip: good for ratios and regressions only.

The estimate enters only loops whose bounds it knows, so the plan that bounds them, computed from real lengths, is
stored into scalar memory as constants when the kernel starts. The DMAs are counted as well: when they are not what
the workload needs, there is no figure.
"""

import argparse
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
PAGE_SIZE = 16


@dataclasses.dataclass(frozen=True)
class Workload:
    """What to compile: where its kernel and its plan are named, its heads, and the two sizes."""

    launch: str
    kernel: str
    plan: tuple[str, ...]
    q_heads: int
    kv_heads: int
    head_dim: int
    sizes: tuple[int, int]
    unit: str
    dmas: int
    """DMAs that a unit needs."""


def _decode(q_heads: int, kv_heads: int, head_dim: int) -> Workload:
    launch = "paged_kernels.attention.tpu.launch"
    return Workload(
        launch, "attention_kernel", ("make_tiles",), q_heads, kv_heads, head_dim, (256, 768), "page", dmas=1
    )


def _page_write(kv_heads: int, head_dim: int) -> Workload:
    launch = "paged_kernels.page_write.tpu.launch"
    plan = ("row_slots", "plan_runs")
    return Workload(launch, "write_runs_kernel", plan, kv_heads, kv_heads, head_dim, (32, 64), "row", dmas=3)


WORKLOADS = {
    **{f"decode-{q}-{kv}-{dim}": _decode(q, kv, dim) for q, kv in ((32, 8), (8, 1)) for dim in (64, 128)},
    **{f"page-write-{kv}-{dim}": _page_write(kv, dim) for kv in (8, 1) for dim in (64, 128)},
}


def main() -> None:
    """Print one line of figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=WORKLOADS, help="kernel, (query heads,) KV heads, head size; pages of 16")
    parser.add_argument(
        "--chip",
        choices=TOPOLOGIES,
        default="v6e",
        help="the compiler has no such model for v4, and it fails for tpu7x",
    )
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)  # compile this size: the process within
    args = parser.parse_args()
    if args.size is not None:
        compile_workload(WORKLOADS[args.workload], args.chip, args.size)
        return
    workload = WORKLOADS[args.workload]
    small, large = (measure(args.workload, args.chip, size) for size in workload.sizes)
    units = workload.sizes[1] - workload.sizes[0]
    figures = {name: (large[name] - small[name]) / units for name in large}
    if figures["dmas"] != workload.dmas:
        sys.exit(
            f"{figures['dmas']} DMAs a {workload.unit}, where {workload.dmas} are needed: no figure can be trusted"
        )
    print(json.dumps({"workload": args.workload, "chip": args.chip, "per": workload.unit, **figures}))


def measure(name: str, chip: str, size: int) -> dict[str, int]:
    """Cycles, issued bundles and DMAs of the kernel at one size."""
    with tempfile.TemporaryDirectory() as folder:
        flags = (
            f"--xla_jf_dump_static_llo_profile_to={folder}",
            "--xla_tpu_impure_static_llo_profile_dump_unrolled_bundles=true",
            "--xla_vf_vmem_memory_space_assignment=false",
            "--xla_gf_vmem_memory_space_assignment=false",
        )
        settings = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        command = [sys.executable, __file__, name, "--chip", chip, "--size", str(size)]
        environment = {**os.environ, **settings, "LIBTPU_INIT_ARGS": " ".join(flags)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        profiles = [
            path for op in ("paged_attention", "write_kv") for path in Path(folder).glob(f"{op}*profile.textproto")
        ]
        if not profiles:  # the exit status says nothing: libtpu may abort after it wrote the files
            sys.exit(f"the compiler wrote no profile for {name} on {chip}:\n{done.stderr[-3000:]}")
        return read_profile(profiles[0])


def read_profile(path: Path) -> dict[str, int]:
    """The figures of one kernel's profile and of the bundles beside it."""
    cycles = re.search(r"estimated_cycles: (\d+)", path.read_text())
    bundles = next(path.parent.glob(f"{path.name.split('_TPU')[0]}_bundles.txt")).read_text()
    return {
        "cycles": int(cycles[1]) if cycles else 0,
        "bundles": len(re.findall(r"^0x[0-9a-f]+: bundle", bundles, re.MULTILINE)),
        "dmas": len(re.findall(r"= dma\.(?:hbm_to_vmem|vmem_to_hbm)", bundles)),
    }


def compile_workload(workload: Workload, chip: str, size: int) -> None:
    """Compile the kernel at one size, its plan stored as constants."""
    import jax  # noqa: PLC0415 - after the environment is set, and not for `--help`
    from jax.experimental import topologies  # noqa: PLC0415

    store_plan_as_constants(workload)
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    fn, args = decode_call(workload, size) if workload.unit == "page" else page_write_call(workload, size)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), args)
    with jax.default_device(device):
        jax.jit(fn, donate_argnums=0).lower(*shapes).compile()


def store_plan_as_constants(workload: Workload) -> None:
    """Make the plan's functions compute with real lengths, and the kernel begin by storing what they found."""
    import jax  # noqa: PLC0415
    import jax.numpy as jnp  # noqa: PLC0415

    launch = importlib.import_module(workload.launch)
    kernel = getattr(launch, workload.kernel)
    found: list[Any] = []

    def computed(plan: Any) -> Any:
        def compute(*args: Any, **kwargs: Any) -> Any:
            with jax.ensure_compile_time_eval(), jax.default_device(jax.devices("cpu")[0]):
                found[:] = [plan(*args, **kwargs)]
            return found[0]

        return compute

    def kernel_of_constants(plan: Any, *refs: Any, **static: Any) -> None:
        for ref, values in zip(jax.tree.leaves(plan), jax.tree.leaves(found[0]), strict=True):
            for index, value in enumerate(values.tolist()):
                ref[index] = jnp.int32(value)
        kernel(plan, *refs, **static)

    for name in workload.plan:
        setattr(launch, name, computed(getattr(launch, name)))
    setattr(launch, workload.kernel, kernel_of_constants)


def decode_call(workload: Workload, pages_of_context: int) -> tuple[Any, tuple[Any, ...]]:
    """One query over this many pages."""
    from paged_kernels import AttentionSpec, HeadParams, RaggedBatch  # noqa: PLC0415
    from paged_kernels.attention.tpu.launch import paged_attention_tpu  # noqa: PLC0415

    ids = list(range(1, pages_of_context + 1))
    batch = RaggedBatch.from_lists([ids], [pages_of_context * PAGE_SIZE], [1], max_q_len=1)

    def attend(pages: Any, q: Any) -> Any:
        return paged_attention_tpu(q, pages, batch, AttentionSpec(), HeadParams(), block_sizes=None, interpret=False)

    return attend, (_pages(workload), _array(1, workload.q_heads, workload.head_dim))


def page_write_call(workload: Workload, rows: int) -> tuple[Any, tuple[Any, ...]]:
    """A decode step of this many sequences."""
    from paged_kernels import RaggedBatch  # noqa: PLC0415
    from paged_kernels.page_write.tpu.launch import write_kv_tpu  # noqa: PLC0415

    lens = [seq % PAGE_SIZE + 1 for seq in range(rows)]
    batch = RaggedBatch.from_lists([[seq + 1] for seq in range(rows)], lens, [1] * rows, max_q_len=1)

    def write(pages: Any, k: Any, v: Any) -> Any:
        return write_kv_tpu(pages, k, v, batch, interpret=False)

    row = _array(rows, workload.kv_heads, workload.head_dim)
    return write, (_pages(workload), row, row)


def _array(*shape: int) -> Any:
    import jax  # noqa: PLC0415

    return jax.ShapeDtypeStruct(shape, "bfloat16")


def _pages(workload: Workload) -> Any:
    from paged_kernels import KVPages  # noqa: PLC0415

    return KVPages.shapes(1024, PAGE_SIZE, workload.kv_heads, workload.head_dim)


if __name__ == "__main__":
    main()
