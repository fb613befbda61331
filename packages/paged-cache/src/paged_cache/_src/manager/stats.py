"""Statistics of a page manager."""

import dataclasses


@dataclasses.dataclass
class Counts:
    """Running totals; `PageStats` explains each."""

    queried_tokens: int = 0
    cached_tokens: int = 0
    evictions: int = 0
    copies: int = 0
    swapped_out: int = 0
    swapped_in: int = 0
    peak_used: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PageStats:
    """State and totals of a page manager at one moment."""

    num_used: int
    """Pages in use."""
    num_cached: int
    """Cached pages: free, with content that is in the prefix index."""
    num_empty: int
    """Empty pages."""
    num_seqs: int
    """Sequences, including those that are swapped out."""
    unused_slots: int
    """Unused slots in last pages; a shared page counts from its longest sequence."""
    page_size: int
    queried_tokens: int
    """Prompt tokens of all admitted sequences."""
    cached_tokens: int
    """Prompt tokens that were cache hits, and so were not computed."""
    evictions: int
    """Cached pages that were evicted."""
    copies: int
    """Pages copied: before the first write to a shared page, or for a cache hit on part of a page."""
    swapped_out: int
    """Pages copied to the host."""
    swapped_in: int
    """Pages copied back from the host."""
    peak_used: int
    """The most pages that were in use at once."""

    @property
    def num_usable(self) -> int:
        """Pages that sequences can use: all except the null page."""
        return self.num_used + self.num_cached + self.num_empty

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that were cache hits, 0 to 1."""
        return self.cached_tokens / self.queried_tokens if self.queried_tokens else 0.0

    @property
    def occupancy(self) -> float:
        """Share of usable pages that are in use, 0 to 1."""
        return self.num_used / self.num_usable

    @property
    def fragmentation(self) -> float:
        """Share of slots in pages in use that hold no token, 0 to 1."""
        return self.unused_slots / (self.num_used * self.page_size) if self.num_used else 0.0
