"""Times paged attention on this machine, and the code that people use instead. Prints a table.

    python tools/bench_attention.py --workload decode-8x2048 --dtype float32

Decode is shown in GB/s of keys and values read. Prefill is shown in GFLOP/s of the causal work. The contestants take
turns, one call each, and the figures are medians. So a busy machine slows all of them alike: compare `ours / it`, not
the times. The machine's own limits are measured in the same run. There are 32 query heads and 8 KV heads of size 128.
Pages hold 32 tokens.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from paged_kernels import AttentionSpec, KVPages, RaggedBatch, paged_attention

Q_HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 32
OURS = "paged_attention (cpu)"
THREADS = 2  # of the read probe


@dataclasses.dataclass(frozen=True)
class Workload:
    """A batch of `seqs` sequences with `kv_len` tokens each. The step computes the last `q_len` tokens of each."""

    seqs: int
    kv_len: int
    q_len: int

    @property
    def is_decode(self) -> bool:
        """True if each sequence has one row."""
        return self.q_len == 1

    def amount(self, dtype: str) -> float:
        """Decode: bytes of keys and values. Prefill: floating-point operations of the causal work."""
        if self.is_decode:
            return self.seqs * self.kv_len * 2 * KV_HEADS * HEAD_DIM * jnp.dtype(dtype).itemsize
        keys = self.q_len * (self.kv_len - self.q_len) + self.q_len * (self.q_len + 1) / 2
        return self.seqs * keys * 4 * Q_HEADS * HEAD_DIM


WORKLOADS = {
    "decode-8x2048": Workload(8, 2048, 1),
    "decode-32x512": Workload(32, 512, 1),
    "decode-1x16384": Workload(1, 16384, 1),
    "decode-8x320": Workload(8, 320, 1),
    "prefill-1x2048": Workload(1, 2048, 2048),
    "prefill-4x512": Workload(4, 512, 512),
    "prefill-512-over-1536": Workload(1, 2048, 512),
}


@dataclasses.dataclass(frozen=True)
class Data:
    """Queries, and the same keys and values twice: in pages, and as contiguous `[seqs, kv_len, kv_heads, head_dim]`."""

    q: jax.Array
    pages: KVPages
    batch: RaggedBatch
    k: jax.Array
    v: jax.Array


def make_data(work: Workload, dtype: str) -> Data:
    """Returns random data. Its pages are in random order."""
    rng = np.random.default_rng(0)
    per_seq = work.kv_len // PAGE_SIZE
    order = 1 + rng.permutation(work.seqs * per_seq)
    batch = RaggedBatch.from_lists(
        order.reshape(work.seqs, per_seq).tolist(),
        [work.kv_len] * work.seqs,
        [work.q_len] * work.seqs,
        max_q_len=1 if work.is_decode else None,
    )
    shapes = KVPages.shapes(len(order) + 1, PAGE_SIZE, KV_HEADS, HEAD_DIM, dtype)
    rows = rng.standard_normal(shapes.data.shape, np.float32)
    pages = dataclasses.replace(shapes, data=jnp.asarray(rows, dtype))
    q = jnp.asarray(rng.standard_normal((work.seqs * work.q_len, Q_HEADS, HEAD_DIM), np.float32), dtype)
    k, v = jax.jit(gather)(pages, batch)
    return Data(q, pages, batch, k, v)


def gather(pages: KVPages, batch: RaggedBatch) -> tuple[jax.Array, jax.Array]:
    """Returns the keys and the values of each sequence as contiguous arrays."""
    k, v = pages.layout.unpack(*pages.take(batch.page_table))
    shape = (batch.max_seqs, -1, KV_HEADS, HEAD_DIM)
    return k.swapaxes(2, 3).reshape(shape), v.swapaxes(2, 3).reshape(shape)


def by_kv_head(q: jax.Array, seqs: int) -> jax.Array:
    """Returns queries as `[seqs, q_len, kv_heads, q_per_kv, head_dim]`."""
    return q.reshape(seqs, -1, KV_HEADS, Q_HEADS // KV_HEADS, HEAD_DIM)


def dense(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention over contiguous keys and values, as an einsum."""
    rows = by_kv_head(q, k.shape[0])
    s = jnp.einsum("bthgd,bphd->bhgtp", rows, k, preferred_element_type=jnp.float32) * HEAD_DIM**-0.5
    t = k.shape[1] - rows.shape[1] + jnp.arange(rows.shape[1])
    s = jnp.where(jnp.arange(k.shape[1]) <= t[:, None], s, -jnp.inf)
    return jnp.einsum("bhgtp,bphd->bthgd", jax.nn.softmax(s).astype(v.dtype), v).reshape(q.shape)


def gather_einsum(q: jax.Array, pages: KVPages, batch: RaggedBatch) -> jax.Array:
    """The code that people write: gather the pages, then an einsum."""
    return dense(q, *gather(pages, batch))


def scan_pages(q: jax.Array, pages: KVPages, batch: RaggedBatch) -> jax.Array:
    """A scan over the page table's columns with an online softmax. Each iteration takes one page of every sequence."""
    rows = by_kv_head(q, batch.max_seqs).astype(jnp.float32) * HEAD_DIM**-0.5
    t = batch.kv_lens[:, None] - rows.shape[1] + jnp.arange(rows.shape[1])

    def see(state, column):
        top, total, values = state
        index, ids = column
        kv = pages.take(ids)[0].astype(jnp.float32)
        s = jnp.einsum("bthgd,bhpd->bthgp", rows, kv[..., :HEAD_DIM])
        p = index * PAGE_SIZE + jnp.arange(PAGE_SIZE)
        s = jnp.where((p <= t[..., None])[:, :, None, None], s, -1e30)
        new_top = jnp.maximum(top, s.max(-1))
        weights, decay = jnp.exp(s - new_top[..., None]), jnp.exp(top - new_top)
        values = values * decay[..., None] + jnp.einsum("bthgp,bhpd->bthgd", weights, kv[..., HEAD_DIM:])
        return (new_top, total * decay + weights.sum(-1), values), None

    start = jnp.full(rows.shape[:-1], -1e30), jnp.zeros(rows.shape[:-1]), jnp.zeros(rows.shape)
    (_, total, values), _ = jax.lax.scan(see, start, (jnp.arange(batch.pages_per_seq), batch.page_table.T))
    return (values / total[..., None]).reshape(q.shape).astype(q.dtype)


def jax_contiguous(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`jax.nn.dot_product_attention` over contiguous keys and values."""
    rows = q.reshape(k.shape[0], -1, Q_HEADS, HEAD_DIM)
    t = k.shape[1] - rows.shape[1] + jnp.arange(rows.shape[1])
    mask = (jnp.arange(k.shape[1]) <= t[:, None])[None, None]
    return jax.nn.dot_product_attention(rows, k, v, mask=mask).reshape(q.shape)


def jax_contestants(data: Data) -> dict[str, Callable[[], object]]:
    """Returns our attention and its peers in jax by name, compiled. Each call waits for its result."""
    ours = {
        f"paged_attention ({name})": functools.partial(paged_attention, spec=AttentionSpec(), backend=name)
        for name in ("cpu", "xla")
    }
    paged = ours | {"scan over pages": scan_pages, "gather pages + einsum": gather_einsum}
    plain = {"contiguous einsum": dense, "contiguous jax.nn.dot_product_attention": jax_contiguous}

    def call(function, *arrays):
        compiled = jax.jit(function)
        return lambda: jax.block_until_ready(compiled(*arrays))

    calls = {name: call(function, data.q, data.pages, data.batch) for name, function in paged.items()}
    return calls | {name: call(function, data.q, data.k, data.v) for name, function in plain.items()}


def torch_contestants(data: Data, dtype: str) -> dict[str, Callable[[], object]]:
    """Returns torch's attention over contiguous and over gathered keys and values. Empty without torch."""
    try:
        import torch  # noqa: PLC0415 (a peer, never a dependency)
    except ImportError:
        progress("torch SDPA: skipped, torch is not installed")
        return {}
    tensor = lambda a: torch.from_numpy(np.array(a, np.float32)).to(getattr(torch, dtype))  # noqa: E731
    seqs = data.k.shape[0]
    k, v = (tensor(a).transpose(1, 2).contiguous() for a in (data.k, data.v))
    q = tensor(data.q).reshape(seqs, -1, Q_HEADS, HEAD_DIM).transpose(1, 2).contiguous()
    pages, table = tensor(data.pages.data), torch.from_numpy(np.array(data.batch.page_table)).long()
    q_len, kv_len = q.shape[2], k.shape[2]
    square = q_len == kv_len
    mask = None if square or q_len == 1 else torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def plain(k=k, v=v):
        if q_len == 1:  # the query heads of one KV head become rows, so each key is read once
            return sdpa(q.reshape(seqs, KV_HEADS, -1, HEAD_DIM), k, v)
        return sdpa(q, k, v, attn_mask=mask, is_causal=square, enable_gqa=True)

    def gathered():
        kv = pages[table].permute(0, 2, 1, 3, 4).reshape(seqs, KV_HEADS, -1, 2 * HEAD_DIM)
        return plain(kv[..., :HEAD_DIM], kv[..., HEAD_DIM:])

    return {"torch SDPA, contiguous": plain, "torch SDPA, gathered pages": gathered}


def seconds_of(call: Callable[[], object]) -> float:
    """Returns the time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median_seconds(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Returns the median time of each call. The calls take turns, after one untimed call of each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        progress(f"  warming up {name}")
        call()
    for turn in range(repeats):
        progress(f"  turn {turn + 1} of {repeats}")
        for name, call in calls.items():
            times[name].append(seconds_of(call))
    return {name: statistics.median(taken) for name, taken in times.items()}


def machine_limits(repeats: int) -> dict[str, float]:
    """Returns the machine's read bandwidth (GB/s) and float32 matmul speed (GFLOP/s), the best of all repeats."""
    progress("the machine's limits")
    array, square = jnp.ones(2**26, jnp.float32), jnp.ones((2048, 2048), jnp.float32)
    total, product, host = jax.jit(jnp.sum), jax.jit(jnp.matmul), np.asarray(array)

    def best(call):
        call()
        return min(seconds_of(call) for _ in range(repeats))

    return {
        "read, numpy sum, one thread (GB/s)": array.nbytes / best(host.sum) / 1e9,
        f"read, {THREADS} threads (GB/s)": array.nbytes / best(lambda: read_in_threads(host)) / 1e9,
        "read, jax sum (GB/s)": array.nbytes / best(lambda: total(array).block_until_ready()) / 1e9,
        "matmul float32 (GFLOP/s)": 2 * 2048**3 / best(lambda: product(square, square).block_until_ready()) / 1e9,
    }


def read_in_threads(array: np.ndarray) -> None:
    """Sum a share of the array on each of some threads. numpy releases Python's lock meanwhile."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(np.sum, np.split(array, THREADS)))


def bench(name: str, dtype: str, repeats: int) -> list[dict]:
    """Returns the rows of the table for one workload."""
    progress(f"{name} {dtype}")
    work = WORKLOADS[name]
    data = make_data(work, dtype)
    seconds = median_seconds(jax_contestants(data) | torch_contestants(data, dtype), repeats)
    rate = {contestant: work.amount(dtype) / taken / 1e9 for contestant, taken in seconds.items()}
    unit = "GB/s" if work.is_decode else "GFLOP/s"
    return [
        {
            "workload": name,
            "dtype": dtype,
            "contestant": contestant,
            "seconds": seconds[contestant],
            "rate": rate[contestant],
            "unit": unit,
            "ours_over_it": rate[OURS] / rate[contestant],
        }
        for contestant in rate
    ]


def progress(line: str) -> None:
    """Print a line of progress to stderr."""
    print(line, file=sys.stderr, flush=True)


def print_table(rows: list[dict], limits: dict[str, float]) -> None:
    """Print the limits, then one line per contestant."""
    for limit, value in limits.items():
        print(f"{limit:<40} {value:8.1f}")
    for row in rows:
        if row["contestant"] == OURS:
            print(f"\n{row['workload']}, {row['dtype']:<28} {row['unit']:>10} {'ours / it':>10}")
        print(f"  {row['contestant']:<42} {row['rate']:10.2f} {row['ours_over_it']:10.2f}")


def main() -> None:
    """Read the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), help="default: all")
    dtypes = ("float32", "bfloat16")
    parser.add_argument("--dtype", nargs="+", choices=dtypes, default=list(dtypes), help="default: both")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each contestant (default: 7)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures to this file")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats} must be at least 1")
    limits = machine_limits(options.repeats)
    rows = [row for name in options.workload for dtype in options.dtype for row in bench(name, dtype, options.repeats)]
    print_table(rows, limits)
    if options.json:
        about = {"jax": jax.__version__, "machine": platform.processor(), "date": time.strftime("%Y-%m-%d")}
        options.json.write_text(json.dumps({**about, "limits": limits, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
