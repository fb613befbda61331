"""Attention over pages in plain XLA, for the CPU and for anywhere: `tiles` (integers), `softmax` (arrays), `walk`."""

from paged_kernels._src.attention.xla.walk import paged_attention_xla

__all__ = ["paged_attention_xla"]
