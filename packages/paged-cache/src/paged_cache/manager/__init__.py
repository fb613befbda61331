"""The bookkeeping of a paged KV cache: numpy and the standard library alone."""

from paged_cache.manager.events import EventKind, PageEvent, Subscriber
from paged_cache.manager.groups import LayerGroup
from paged_cache.manager.manager import PageManager
from paged_cache.manager.moves import PageMoves
from paged_cache.manager.pool import OutOfPages, PagePool
from paged_cache.manager.prefix import KeptPage, Media
from paged_cache.manager.prompt import Prompt
from paged_cache.manager.reuse import Pin
from paged_cache.manager.stats import PageStats

__all__ = [
    "EventKind",
    "KeptPage",
    "LayerGroup",
    "Media",
    "OutOfPages",
    "PageEvent",
    "PageManager",
    "PageMoves",
    "PagePool",
    "PageStats",
    "Pin",
    "Prompt",
    "Subscriber",
]
