"""How a backend cuts the work: tunable, and never a matter of the result."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """The sizes of one step of a kernel's loops.

    Raises:
        ValueError: a size is below 1.
    """

    q_rows: int
    """Query rows of one sequence that are attended at once."""
    kv_pages: int
    """Pages of one sequence that are fetched and attended at once."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if size < 1:
                raise ValueError(f"{field.name}={size} must be at least 1")
