"""Times `load_model` beside transformers' `from_pretrained`, for one checkpoint, in one run.

    python tools/bench_load.py                      # makes a Llama checkpoint of 2.2 GB in bfloat16
    python tools/bench_load.py --model ~/models/SmolLM2-135M --dtype float32

Each load is a process of its own, in turns, so a busy machine slows both. Two times are shown: until the model is
returned, and until each weight was summed once. transformers maps the file into memory and reads a weight when it is
used, so only the second compares the same work. The memory is the most that the process held above its start.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

import ml_dtypes

ROOT = pathlib.Path(__file__).parent.parent
COMMON = """
import json, sys, time
import numpy as np
from paged_attn_layer._src.convert.progress import HostMemory
path, dtype = sys.argv[1:]
"""
DONE = """
used = time.perf_counter() - start
print(json.dumps({"loaded": loaded, "used": used, "memory": memory.rise()}))
"""
CONTESTANTS = {
    "ours": COMMON
    + """
import jax, jax.numpy as jnp
from flax import nnx
from paged_attn_layer import load_model
total = jax.jit(lambda weight: jnp.sum(weight, dtype=jnp.float32))
total(jnp.ones(3))
memory, start = HostMemory(), time.perf_counter()
model = jax.block_until_ready(nnx.split(load_model(path, dtype=dtype))[1])
loaded = time.perf_counter() - start
for weight in jax.tree.leaves(model):
    float(total(weight))
"""
    + DONE,
    "transformers": COMMON
    + """
import torch, transformers
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
memory, start = HostMemory(), time.perf_counter()
model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), local_files_only=True)
loaded = time.perf_counter() - start
for weight in model.parameters():
    float(weight.detach().sum(dtype=torch.float32))
"""
    + DONE,
}


def turn(name: str, model: pathlib.Path, dtype: str) -> dict[str, float]:
    """Returns the figures of one load, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", CONTESTANTS[name], str(model), dtype], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(model: pathlib.Path, dtype: str, turns: int) -> None:
    """Prints a line of medians for each contestant."""
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    print(f"{model}: {size / 1e9:.2f} GB, as {dtype}; medians of {turns} turns")
    figures: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    for _ in range(turns):
        for name, results in figures.items():
            results.append(turn(name, model, dtype))
    for name, results in figures.items():
        loaded, used, memory = (statistics.median(result[key] for result in results) for key in results[0])
        print(
            f"{name:>14}  loaded {loaded:6.1f} s   every weight used {used:6.1f} s ({size / used / 1e9:.2f} GB/s)   "
            f"memory {memory / 1e9:.2f} GB"
        )


def main() -> None:
    """Compare the checkpoint that is asked for, or one that is made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, help="a Hugging Face directory (default: one is made)")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--turns", type=int, default=3, help="loads of each (default: %(default)s)")
    args = parser.parse_args()
    if args.model:
        compare(args.model, args.dtype, args.turns)
        return
    sys.path.insert(0, str(ROOT / "packages/paged-attn-layer/tests/support"))
    from large_checkpoint import write_large  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as folder:
        write_large(pathlib.Path(folder), ml_dtypes.bfloat16)
        compare(pathlib.Path(folder), args.dtype, args.turns)


if __name__ == "__main__":
    main()
