"""How a backend splits the work. Block sizes change the speed, not the result."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """What one step of a kernel's loops computes.

    Raises:
        ValueError: a size is below 1.
    """

    q_rows: int
    """Query rows of one sequence that are attended together."""
    kv_pages: int
    """Pages of one sequence that are copied and attended together."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if size < 1:
                raise ValueError(f"{field.name}={size} must be at least 1")
