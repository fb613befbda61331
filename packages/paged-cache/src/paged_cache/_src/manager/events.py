"""What subscribers are told of pages whose content others can find."""

import dataclasses
from collections.abc import Callable
from typing import Literal

EventKind = Literal["stored", "removed", "evicted", "swapped_out", "swapped_in"]


@dataclasses.dataclass(frozen=True)
class PageEvent:
    """Something that happened to one page.

    stored       | it can be found by its key
    removed      | it cannot any more, because its owner writes it again, or all was to be forgotten
    evicted      | it cannot any more, because it was handed out
    swapped_out  | a sequence's content left it for the host
    swapped_in   | a sequence's content came back into it
    """

    kind: EventKind
    page: int
    group: int
    """Index of the group of layers that the page belongs to."""
    hash: bytes = b""
    """The content's key; empty for a partial page and for swaps."""


Subscriber = Callable[[list[PageEvent]], None]
"""Called once after each operation that has events, with all of them in order. The operation is complete by then: an
error that a subscriber raises reaches the caller, and undoes nothing."""
