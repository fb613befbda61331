"""Block sizes that a search found, as data: `lookup` reads them, `tools/tune.py` writes them."""
