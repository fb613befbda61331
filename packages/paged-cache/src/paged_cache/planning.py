"""How many pages, sequences and tokens of a model fit into memory; also a command, `python -m paged_cache plan`."""

from paged_cache._src.planning.plan import Plan, plan

__all__ = ["Plan", "plan"]
