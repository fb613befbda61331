"""A paged KV cache for JAX: pages, their pool, and the metadata of a batch."""
