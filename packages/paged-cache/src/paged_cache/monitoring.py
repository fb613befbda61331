"""What happens to a page manager's pages: statistics, events, and both over time as text or as a picture."""

from paged_cache._src.manager import EventKind, PageEvent, PageStats, Subscriber
from paged_cache._src.monitoring.history import PageHistory

__all__ = ["EventKind", "PageEvent", "PageHistory", "PageStats", "Subscriber"]
