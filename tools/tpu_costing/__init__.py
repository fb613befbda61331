"""What `tools/tpu_cost.py` and `tools/tune.py` are made of."""
