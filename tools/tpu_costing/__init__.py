"""The parts of `tools/tpu_cost.py` and `tools/tune.py`."""
