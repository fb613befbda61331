"""Continuous batching over the paged KV cache."""

from paged_attn_layer.engine.completion import Completion
from paged_attn_layer.engine.config import EngineConfig
from paged_attn_layer.engine.engine import Engine
from paged_attn_layer.engine.request import Request
from paged_attn_layer.engine.scheduler import Scheduler
from paged_attn_layer.engine.stats import EngineStats

__all__ = ["Completion", "Engine", "EngineConfig", "EngineStats", "Request", "Scheduler"]
