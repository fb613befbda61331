"""The ordinary workloads catch a kernel's faults: the twin passes them, and with any of the seeded faults it fails."""

import numpy as np
import pytest
from kernel_data import CASES, SPECS, WORKLOADS, assert_lse_close, assert_rows_close, attend_densely, make_case
from kernel_twin import Twin


class DropsAPage(Twin):
    """The last of a sequence's pages is never reached."""

    def page_range(self, seq, t):
        first, end = super().page_range(seq, t)
        return first, max(first + 1, end - 1)


class DropsOneKey(Twin):
    """The newest key is left out for all rows but where it is the only one."""

    def visible(self, t, p, kv_len):
        return super().visible(t, p, kv_len) & ((p < kv_len - 1) | (kv_len == 1))


class DropsTheKeyAtAPageEdge(Twin):
    """The first key of the second page is left out."""

    def visible(self, t, p, kv_len):
        return super().visible(t, p, kv_len) & (p != self.page_size)


class SkipsTheFirstBlock(Twin):
    """A loop that starts one block late, where there is more than one."""

    def page_range(self, seq, t):
        first, end = super().page_range(seq, t)
        return (first + self.block_pages if first + self.block_pages < end else first), end


class WindowOneTooWide(Twin):
    """The edge of the window off by one, outwards."""

    def in_window(self, t, p):
        return True if self.spec.sliding_window is None else t - p <= self.spec.sliding_window


class WindowOneTooNarrow(Twin):
    """The edge of the window off by one, inwards."""

    def in_window(self, t, p):
        return True if self.spec.sliding_window is None else t - p < max(1, self.spec.sliding_window - 1)


class WindowFromThePage(Twin):
    """Pages outside the window are skipped, but the edge within a page is forgotten."""

    def in_window(self, t, p):
        return True if self.spec.sliding_window is None else p >= (t[0] - self.spec.sliding_window + 1) // 16 * 16


class IgnoresTheWindow(Twin):
    """The option is swallowed."""

    def in_window(self, t, p):
        return True


class IgnoresTheCap(Twin):
    """The option is swallowed."""

    def cap(self, s):
        return s


class CapsBeforeTheScale(Twin):
    """`scale * cap(q k)` in place of `cap(scale * q k)`."""

    def logits(self, q, k):
        return self.scale(q.shape[1]) * self.cap(q @ k.T)


class HalvesTheScale(Twin):
    """Half the scale."""

    def scale(self, head_dim):
        return super().scale(head_dim) / 2


class IgnoresTheScale(Twin):
    """The default scale whatever the spec says."""

    def scale(self, head_dim):
        return head_dim**-0.5


class WrongHeadOfTheGroup(Twin):
    """Query heads dealt round the KV heads in place of in groups."""

    def kv_head(self, head):
        return head % self.k.shape[0]


class StalePage(Twin):
    """The page table is read one entry back, as after a late copy."""

    def page_id(self, seq, index):
        return super().page_id(seq, max(0, index - 1))


class PageOfTheNeighbour(Twin):
    """The page table of the sequence before."""

    def page_id(self, seq, index):
        return super().page_id(max(0, seq - 1), index)


class ForgetsToRescaleTheValues(Twin):
    """The accumulated values keep the old maximum."""

    def rescale_values(self, acc, keep):
        return acc * (keep > 0)[:, None]


class ForgetsToRescaleTheTotal(Twin):
    """The accumulated sum keeps the old maximum."""

    def rescale_total(self, total, keep):
        return total * (keep > 0)


class ForgetsTheMaximumInTheLse(Twin):
    """The log-sum-exp is that of the shifted logits; the output is right."""

    def lse(self, top, total):
        return np.log(total)


class SwapsKeysAndValues(Twin):
    """K and V the wrong way round."""

    def fetch(self, *args):
        positions, k, v = super().fetch(*args)
        return positions, v, k


class ReadsTheLastPageWhole(Twin):
    """Slots past the sequence's end count as keys, where causality does not hide them."""

    def visible(self, t, p, kv_len):
        return super().visible(t, p, -(-kv_len // self.page_size) * self.page_size)


class CausalOneTooMany(Twin):
    """A row sees the key after its own."""

    def in_causal(self, t, p):
        return (p <= t + 1) | (not self.spec.causal)


class CausalOneTooFew(Twin):
    """A row does not see its own key, unless it is the first."""

    def in_causal(self, t, p):
        return (p < np.maximum(t, 1)) | (not self.spec.causal)


class AlwaysCausal(Twin):
    """The option is swallowed."""

    def in_causal(self, t, p):
        return p <= t


class RowsAtTheStart(Twin):
    """A chunk's rows stand at the start of the sequence in place of its end (the seed's first fault)."""

    def in_causal(self, t, p):
        return super().in_causal(t - t[0], p)


MUTANTS = {mutant.__name__: mutant for mutant in Twin.__subclasses__()}


def run_all_cases(kernel: Twin, tolerance_of: str) -> None:
    """Raises AssertionError at the first of the ordinary cases that tells `kernel` from the oracle."""
    for workload, spec in CASES:
        case = make_case(WORKLOADS[workload], spec=SPECS[spec])
        expected, expected_lse = attend_densely(case, SPECS[spec])
        out, lse = kernel(case.q, case.pages, case.batch, SPECS[spec])
        assert_rows_close(out, expected, tolerance_of)
        assert_lse_close(lse, expected_lse, tolerance_of)


@pytest.mark.parametrize("block_pages", [1, 2, 3])
def test_the_twin_is_right(block_pages):
    kernel = Twin()
    kernel.block_pages = block_pages
    run_all_cases(kernel, "float32")


@pytest.mark.parametrize("mutant", MUTANTS)
def test_fault_is_caught_even_at_the_tolerance_of_bfloat16(mutant):
    with pytest.raises(AssertionError, match=r"rows are off|Not equal to tolerance"), np.errstate(all="ignore"):
        run_all_cases(MUTANTS[mutant](), "bfloat16")
