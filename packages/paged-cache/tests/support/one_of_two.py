"""One of two processes that serve from the same caches; `test_two_processes.py` starts both.

Arguments: the process's number, and the address at which process 0 coordinates.
"""

import sys

import jax
import numpy as np
from filled_cache import mesh_of
from jax.experimental import multihost_utils
from jax.sharding import AxisType
from random_calls import RandomCalls
from serving_loop import ServingLoop

from paged_cache import CacheConfig


def check_answers():
    """Both managers have given the same answers to the same calls, and have done all that there is to do."""
    calls = RandomCalls(seed=0)
    calls.make(1000)
    stats = calls.manager.stats()
    print(stats)
    assert min(stats.cached_tokens, stats.evictions, stats.copies, stats.swapped_out, stats.swapped_in) > 0
    answers = np.frombuffer(calls.digest.digest(), np.uint8)
    multihost_utils.assert_equal(answers, "tables, moves or events differ between the processes")


def check_config(mesh, process):
    """Both take as many pages as the one with less memory has room for."""

    def pages(byte_budget):
        sizes = {"max_sequences": 64, "page_size": 4, "num_kv_heads": 4, "kv_head_dim_size": 4}
        return CacheConfig.create(mesh, 4, 1, **sizes, byte_budget=byte_budget).num_pages

    assert pages([2**16, 2**18][process]) == pages(2**16) < pages(2**18)


def check_pages(mesh, data_axis=None):
    """After each step this process's devices hold what a cache of this process alone holds, and have attended it."""
    shared = ServingLoop(mesh, data_axis=data_axis)
    alone = [ServingLoop() for _ in shared.managers]  # one for each replica
    lives = [loop.lives(replica) for replica, loop in enumerate(alone)]
    for running, *each in zip(shared.lives(), *lives, strict=True):
        outputs = shared.step(running)
        attended = [loop.step(seqs) for loop, seqs in zip(alone, each, strict=True)]
        assert_same(shared.cache, [loop.cache for loop in alone], np.concatenate)
        assert_same(outputs, attended, np.concatenate if data_axis is None else np.stack)
        for loop, seqs, of_loop in zip(alone, each, attended, strict=True):
            loop.check(seqs, of_loop)


def assert_same(shared, alone, join):
    """This process's part of the shared arrays is what the joined ones have there."""
    whole = jax.tree.map(lambda *parts: join(parts), *alone)
    for array, want in zip(jax.tree.leaves(shared), jax.tree.leaves(whole), strict=True):
        assert len(array.addressable_shards) == jax.local_device_count()
        for shard in array.addressable_shards:
            np.testing.assert_allclose(shard.data, want[shard.index], rtol=1e-6, atol=1e-6)


def main(process, address):
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=process)
    assert (jax.device_count(), jax.local_device_count()) == (4, 2)
    check_answers()
    check_config(mesh_of(tp=4), process)
    check_pages(mesh_of(tp=4))
    check_pages(mesh_of(AxisType.Explicit, dp=2, tp=2), "dp")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
