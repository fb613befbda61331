"""Attention over pages in plain XLA, for any platform.

- `prepare`: the static sizes, and what all layers of a step need from its batch.
- `work_list`: which rows attend to which keys, as integers.
- `walk`: the loops over tiles and blocks of pages.
- `softmax`: the online softmax, on arrays.
"""
