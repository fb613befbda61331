"""The sizes of an engine."""

import dataclasses

from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How much an engine serves at once.

    Raises:
        ValueError: a size is below its least, or the cache is smaller than one page.
    """

    max_seqs: int = 8
    """Requests that run at once; more wait."""
    max_sequence_length: int = 1024
    """Tokens of the longest request, its answer included."""
    page_size: int = 16
    """Tokens a page holds."""
    num_pages: int | None = None
    """Pages of the cache, the null page included; `None` means enough for `max_seqs` of the longest requests, or as
    many as fit."""
    prefill_chunk: int = 128
    """Prompt tokens that a step has room for beside `max_seqs` decodes."""
    prefix_reuse: bool = True
    """Whether requests share pages that hold the same prefix."""
    kv_dtype: DTypeLike | None = None
    """Type of the cached keys and values (`paged_kernels.KVPages`), also int8, float8_e4m3fn, float8_e5m2 or int4;
    `None` means that of the model."""

    def __post_init__(self) -> None:
        least = {"max_seqs": 1, "max_sequence_length": 2, "page_size": 1, "num_pages": 2, "prefill_chunk": 1}
        for name, minimum in least.items():
            size = getattr(self, name)
            if size is not None and size < minimum:
                raise ValueError(f"{name}={size} must be at least {minimum}")

    @property
    def token_budget(self) -> int:
        """Most rows of a step: a decode for each slot, and a prompt's chunk."""
        return self.max_seqs + self.prefill_chunk

    @property
    def token_buckets(self) -> tuple[int, ...]:
        """Rows that a step with prompt tokens is padded to: room for a short prompt, and for a whole chunk."""
        return tuple(sorted({self.max_seqs + max(1, self.prefill_chunk // 4), self.token_budget}))
