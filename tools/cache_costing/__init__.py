"""The parts of `tools/bench_cache.py`: the workloads, our page manager, and vLLM's manager in its own process."""
