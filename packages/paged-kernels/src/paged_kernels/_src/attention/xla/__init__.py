"""Attention over pages in plain XLA, for any platform.

- `work_list`: which rows attend to which keys, as integers.
- `softmax`: the online softmax, on arrays.
- `walk`: the loops over tiles and blocks of pages.
"""

from paged_kernels._src.attention.xla.walk import paged_attention_xla

__all__ = ["paged_attention_xla"]
