"""What `tools/bench_cache.py` measures: the workloads, our page manager, and vLLM's in a process of its own."""
