"""Attention over pages in plain XLA, for any platform.

- `work_list`: which rows attend to which keys, as integers.
- `prepare`: the static sizes, and what a step's layers share.
- `softmax`: the online softmax, on arrays.
- `walk`: the loops over tiles and blocks of pages.
"""
