"""Attention over pages: the call (`api`), the reference that defines it, and one module or folder per backend."""
