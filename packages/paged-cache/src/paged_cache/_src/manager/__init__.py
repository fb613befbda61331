"""The page manager of a KV cache; needs only numpy and the standard library."""

from paged_cache._src.manager.cache_hit import Pin
from paged_cache._src.manager.events import EventKind, PageEvent, Subscriber
from paged_cache._src.manager.groups import KVShape, LayerGroup
from paged_cache._src.manager.manager import PageManager
from paged_cache._src.manager.moves import PageMoves
from paged_cache._src.manager.pool import OutOfPages, PagePool
from paged_cache._src.manager.prefix import IndexedPage, Media
from paged_cache._src.manager.prompt import Prompt
from paged_cache._src.manager.stats import PageStats

__all__ = [
    "EventKind",
    "IndexedPage",
    "KVShape",
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
