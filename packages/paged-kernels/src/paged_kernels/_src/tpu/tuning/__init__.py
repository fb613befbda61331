"""Tuned block sizes, as data. `lookup` reads them, and `tools/tune.py` writes them."""
