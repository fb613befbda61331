"""Continuous batching over the paged KV cache."""

from paged_attn_layer._src.engine.completion import Completion
from paged_attn_layer._src.engine.config import EngineConfig
from paged_attn_layer._src.engine.engine import Engine
from paged_attn_layer._src.engine.request import Request
from paged_attn_layer._src.engine.scheduler import Scheduler
from paged_attn_layer._src.engine.stats import EngineStats

__all__ = ["Completion", "Engine", "EngineConfig", "EngineStats", "Request", "Scheduler"]
