"""Attention over pages: the call (`api`), its definition (`reference`) and one module a backend."""
