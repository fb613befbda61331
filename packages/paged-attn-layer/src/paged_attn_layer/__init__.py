"""Paged attention as a layer for JAX: operator, flax.nnx modules, Hugging Face conversion, generation."""
