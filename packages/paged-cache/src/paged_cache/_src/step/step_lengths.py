"""The lengths of a step's sequences, checked; positions and written pages follow from them."""

from typing import NamedTuple

import numpy as np

from paged_cache._src.manager.arrays import first_true, least, most, runs


class StepLengths(NamedTuple):
    """Lengths of a step's `n` sequences; each array is `[n]`."""

    q: np.ndarray
    """Tokens that the step computes for each sequence."""
    kv: np.ndarray
    """All tokens of each sequence, including those of this step."""
    before: np.ndarray
    """Tokens before this step: the position of the sequence's first row."""
    ends: np.ndarray
    """The row after each sequence's last row."""
    num_tokens: int
    """Tokens of the step: its rows without padding."""
    is_decode: bool
    """True if each sequence computes one token. Only valid after `check`."""

    @classmethod
    def of(cls, kv_lens: np.ndarray, q_lens: np.ndarray) -> "StepLengths":
        """Create from lengths; call `check` before use."""
        ends = np.add.accumulate(q_lens, dtype=np.int64)  # int64: unchecked lengths must not overflow
        num_tokens = int(ends[-1]) if len(ends) else 0
        return cls(q_lens, kv_lens, kv_lens - q_lens, ends, num_tokens, num_tokens == len(q_lens))

    def num_pages(self, page_size: int) -> np.ndarray:
        """Pages of each sequence: `ceil(kv / page_size)`."""
        return -(-self.kv // page_size)

    def check(self, pages_per_seq: int, page_size: int) -> None:
        """Check that the lengths are possible and fit the page tables.

        Raises:
            ValueError: a length is wrong; names the sequence.
        """
        if least(self.q, if_none=1) < 1:
            at = self.q.argmin()
            raise ValueError(f"sequence {at} has q_len={self.q[at]}; it must be at least 1, or leave the sequence out")
        if (at := first_true(self.kv < self.q)) is not None:
            raise ValueError(
                f"sequence {at} has kv_len={self.kv[at]}; it must count this step's q_len={self.q[at]} tokens too"
            )
        if most(self.kv, if_none=0) > pages_per_seq * page_size:
            at = self.kv.argmax()
            raise ValueError(
                f"sequence {at} with kv_len={self.kv[at]} needs {self.num_pages(page_size)[at]} pages of {page_size}, "
                f"more than pages_per_seq={pages_per_seq}; end it, or raise pages_per_seq"
            )

    def positions(self) -> np.ndarray:
        """The position of each row in its sequence, `[num_tokens]`."""
        return self.before if self.is_decode else runs(self.before, self.q)

    def written_entries(self, pages_per_seq: int, page_size: int) -> np.ndarray:
        """Indices into the flattened page tables `[n * pages_per_seq]` of the pages that the step writes."""
        table_starts = np.arange(0, len(self.q) * pages_per_seq, pages_per_seq, dtype=np.int32)
        first = self.before // page_size
        return table_starts + first if self.is_decode else runs(table_starts + first, self.num_pages(page_size) - first)
