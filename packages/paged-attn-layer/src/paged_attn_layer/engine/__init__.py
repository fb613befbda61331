"""Continuous batching over the paged KV cache."""
