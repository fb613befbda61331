"""What the sequences of a step ask for: which rows, which pages, and whether that makes sense."""

from typing import NamedTuple

import numpy as np


class StepLengths(NamedTuple):
    """Lengths of a step's sequences, `[n]` each."""

    q: np.ndarray
    """Tokens that the step computes."""
    kv: np.ndarray
    """Tokens, those included."""
    used: np.ndarray
    """Pages that the tokens take: `ceil(kv / page_size)`."""
    ends: np.ndarray
    """Row after each sequence's last."""

    @classmethod
    def of(cls, kv_lens: np.ndarray, q_lens: np.ndarray, page_size: int) -> "StepLengths":
        """The lengths, not checked yet."""
        ends = np.add.accumulate(q_lens, dtype=np.int64)  # the sum of lengths that each are too large must not wrap
        return cls(q=q_lens, kv=kv_lens, used=-(-kv_lens // page_size), ends=ends)

    @property
    def rows(self) -> int:
        """Rows of the step."""
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def is_decode(self) -> bool:
        """Whether each sequence has one row; lengths that have been checked are at least 1."""
        return self.rows == len(self.q)

    def check(self, pages_per_seq: int, page_size: int) -> None:
        """Refuse lengths that make no sense, or whose pages no table holds.

        Raises:
            ValueError: names the sequence, what its length is, and what it must be.
        """
        at = first_true((self.q < 1) | (self.kv < self.q) | (self.used > pages_per_seq))
        if at is None:
            return
        q, kv = self.q[at], self.kv[at]
        if q < 1:
            raise ValueError(f"sequence {at} has q_len={q}; it must be at least 1, or leave the sequence out")
        if kv < q:
            raise ValueError(f"sequence {at} has kv_len={kv}; it must count this step's q_len={q} tokens too")
        raise ValueError(
            f"sequence {at} with kv_len={kv} needs {self.used[at]} pages of {page_size}, more than "
            f"pages_per_seq={pages_per_seq}; end it, or raise pages_per_seq"
        )

    def positions(self) -> np.ndarray:
        """Position of each row, `[rows]`."""
        return self.kv - 1 if self.is_decode else runs(self.kv - self.q, self.q)

    def written_entries(self, pages_per_seq: int, page_size: int) -> np.ndarray:
        """Entries of the flattened page table, `[seqs * pages_per_seq]`, whose pages the step writes."""
        table_rows = np.arange(0, len(self.q) * pages_per_seq, pages_per_seq, dtype=np.int32)
        if self.is_decode:
            return table_rows + (self.used - 1)
        first_written = (self.kv - self.q) // page_size
        return runs(table_rows + first_written, self.used - first_written)


def runs(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """`starts[i], starts[i] + 1, ...`, `counts[i]` of them, for each `i`, one after the other.

    >>> runs(np.array([7, 0]), np.array([1, 3])).tolist()
    [7, 0, 1, 2]
    """
    ends = np.cumsum(counts)
    return np.repeat(starts - ends + counts, counts) + np.arange(ends[-1])


def first_true(wrong: np.ndarray) -> int | None:
    """Index of the first true entry."""
    return int(wrong.argmax()) if wrong.any() else None
