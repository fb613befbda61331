"""What the sequences of a step ask for: which rows, which pages, and whether that makes sense."""

from typing import NamedTuple

import numpy as np

from paged_cache._src.manager.arrays import first_true, least, most, runs


class StepLengths(NamedTuple):
    """Lengths of a step's sequences, `[n]` each."""

    q: np.ndarray
    """Tokens that the step computes."""
    kv: np.ndarray
    """Tokens, those included."""
    before: np.ndarray
    """Tokens, those not included: the position of the sequence's first row."""
    ends: np.ndarray
    """Row after each sequence's last."""
    rows: int
    """Rows of the step."""
    is_decode: bool
    """Whether each sequence has one row, if no length is below 1, as `check` makes sure."""

    @classmethod
    def of(cls, kv_lens: np.ndarray, q_lens: np.ndarray) -> "StepLengths":
        """The lengths, not checked yet."""
        ends = np.add.accumulate(q_lens, dtype=np.int64)  # the sum of lengths that each are too large must not wrap
        rows = int(ends[-1]) if len(ends) else 0
        return cls(q_lens, kv_lens, kv_lens - q_lens, ends, rows, rows == len(q_lens))

    def used(self, page_size: int) -> np.ndarray:
        """Pages that the tokens take: `ceil(kv / page_size)`."""
        return -(-self.kv // page_size)

    def check(self, pages_per_seq: int, page_size: int) -> None:
        """Refuse lengths that make no sense, or whose pages no table holds.

        Raises:
            ValueError: names the sequence, what its length is, and what it must be.
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
                f"sequence {at} with kv_len={self.kv[at]} needs {self.used(page_size)[at]} pages of {page_size}, more "
                f"than pages_per_seq={pages_per_seq}; end it, or raise pages_per_seq"
            )

    def positions(self) -> np.ndarray:
        """Position of each row, `[rows]`."""
        return self.before if self.is_decode else runs(self.before, self.q)

    def written_entries(self, pages_per_seq: int, page_size: int) -> np.ndarray:
        """Entries of the flattened page table, `[seqs * pages_per_seq]`, whose pages the step writes."""
        table_rows = np.arange(0, len(self.q) * pages_per_seq, pages_per_seq, dtype=np.int32)
        first = self.before // page_size
        return table_rows + first if self.is_decode else runs(table_rows + first, self.used(page_size) - first)
