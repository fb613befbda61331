"""Events: what subscribers are told about indexed and swapped pages."""

import dataclasses
from collections.abc import Callable
from typing import Literal

EventKind = Literal["stored", "removed", "evicted", "swapped_out", "swapped_in"]


@dataclasses.dataclass(frozen=True)
class PageEvent:
    """Something that happened to one page.

    stored       | the page was added to the prefix index
    removed      | it left the index: its sequence writes it again, or the prefix cache was reset
    evicted      | it left the index: it was allocated anew
    swapped_out  | its content was copied to the host
    swapped_in   | it received content from the host
    """

    kind: EventKind
    page: int
    group: int
    """Index of the layer group that uses the page."""
    hash: bytes = b""
    """Hash of the page's content; empty for a partial page and for swaps."""


Subscriber = Callable[[list[PageEvent]], None]
"""Called once after each operation that has events, with all of its events in order.

The operation is complete by then. An error in a subscriber reaches the caller and undoes nothing.
"""
