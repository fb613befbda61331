"""What a page manager has done, and how full it is."""

import dataclasses


@dataclasses.dataclass
class Counts:
    """Running totals."""

    queried_tokens: int = 0
    cached_tokens: int = 0
    evictions: int = 0
    copies: int = 0
    swapped_out: int = 0
    swapped_in: int = 0
    peak_used: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PageStats:
    """A page manager at one moment."""

    num_used: int
    """Pages with an owner."""
    num_cached: int
    """Free pages whose content can still be found."""
    num_empty: int
    """Free pages that hold nothing."""
    num_seqs: int
    """Sequences, those swapped out included."""
    unused_slots: int
    """Slots of used pages that hold no token yet: the ends of last pages."""
    page_size: int
    queried_tokens: int
    """Prompt tokens of all sequences admitted so far."""
    cached_tokens: int
    """Those of them that were found in pages."""
    evictions: int
    """Pages whose content was lost because they were handed out."""
    copies: int
    """Pages copied on the first write to a shared page, or for a partial prefix."""
    swapped_out: int
    """Pages copied to the host."""
    swapped_in: int
    """Pages copied back."""
    peak_used: int
    """The most pages that had owners at once."""

    @property
    def num_usable(self) -> int:
        """Pages that sequences can have: all but the null page."""
        return self.num_used + self.num_cached + self.num_empty

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that were found in pages, 0 to 1."""
        return self.cached_tokens / self.queried_tokens if self.queried_tokens else 0.0

    @property
    def occupancy(self) -> float:
        """Share of usable pages with an owner, 0 to 1."""
        return self.num_used / self.num_usable

    @property
    def fragmentation(self) -> float:
        """Share of the slots of used pages that hold no token, 0 to 1."""
        return self.unused_slots / (self.num_used * self.page_size) if self.num_used else 0.0
