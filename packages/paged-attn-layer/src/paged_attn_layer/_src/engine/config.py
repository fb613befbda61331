"""The sizes of an engine."""

import dataclasses

from jax.typing import DTypeLike

from paged_attn_layer._src.engine import checks

DEFAULT_SEQUENCE_LENGTH = 1024
"""Most tokens of a request where nothing is said, and the model allows it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The sizes of an engine and of its cache.

    Raises:
        ValueError: a size is below its minimum.
    """

    max_seqs: int = 8
    """Most requests that run at once. More wait."""
    max_sequence_length: int | None = None
    """Most tokens of a request, with its answer. `None`: 1024, or the model's longest sequence if that is shorter;
    `Engine.config` has the number."""
    page_size: int = 16
    """Tokens per page."""
    num_pages: int | None = None
    """Pages of the cache, with the null page. `None`: enough for `max_seqs` of the longest requests, or as many as
    fit into memory."""
    prefill_chunk: int = 128
    """Prompt tokens that fit into a step beside `max_seqs` decodes."""
    prefix_reuse: bool = True
    """True if requests with the same prefix share its pages."""
    kv_dtype: DTypeLike | None = None
    """Type of the cached keys and values, also int8, float8_e4m3fn, float8_e5m2 or int4. `None`: the model's type.

    int4 takes about half the memory of int8 at head sizes above 64, and the same at 64 and below."""

    def __post_init__(self) -> None:
        least = {"max_seqs": 1, "max_sequence_length": 2, "page_size": 1, "num_pages": 2, "prefill_chunk": 1}
        for name, minimum in least.items():
            size = getattr(self, name)
            if size is not None or name not in ("max_sequence_length", "num_pages"):
                object.__setattr__(self, name, checks.whole_number(name, size, minimum))

    @property
    def token_budget(self) -> int:
        """Most rows of a step: one decode for each of `max_seqs` requests, and one prefill chunk."""
        return self.max_seqs + self.prefill_chunk

    @property
    def token_buckets(self) -> tuple[int, ...]:
        """Row counts to which steps with prompt tokens are padded: one for a short prompt, one for a whole chunk."""
        return tuple(sorted({self.max_seqs + max(1, self.prefill_chunk // 4), self.token_budget}))
