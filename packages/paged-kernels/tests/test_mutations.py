"""The ordinary workloads catch a kernel's faults: the twin passes them, and with any of the faults below it fails."""

import functools

import numpy as np
import pytest
from kernel_data import ALL_CASES, SPECS, assert_lse_close, assert_rows_close, attend_densely, make_named_case
from kernel_twin import Twin

pytestmark = pytest.mark.once


class DropsAPage(Twin):
    """The last of a sequence's pages is never reached."""

    def page_range(self, seq, t):
        first, end = super().page_range(seq, t)
        return first, max(first + 1, end - 1)


class DropsOneKey(Twin):
    """The newest key is left out for all rows but where it is the only one."""

    def kv_end(self, seq):
        return max(1, super().kv_end(seq) - 1)


class DropsTheKeyAtAPageEdge(Twin):
    """The first key of the second page is left out."""

    def visible(self, t, p, *args):
        return super().visible(t, p, *args) & (p != self.page_size)


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

    def logits(self, q, k, bias):
        return self.scale(q.shape[1]) * self.cap(q @ k.T) + bias


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
        return head % self.k.shape[1]


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

    def kv_end(self, seq):
        return -(-super().kv_end(seq) // self.page_size) * self.page_size


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
    """The rows of a prefill chunk are placed at the start of the sequence instead of its end."""

    def in_causal(self, t, p):
        return super().in_causal(t - t[0], p)


class IgnoresTheFirstPosition(Twin):
    """The rows of a part of a context taken for its newest tokens."""

    def first_position(self, seq, rows):
        return self.kv_lens[seq] - rows


class ScaleOfAnotherHead(Twin):
    """Quantised keys times the scale of the next KV head."""

    def k_scales(self, ids, head):
        return super().k_scales(ids, (head + 1) % self.k.shape[1])


class ScaleOfKForV(Twin):
    """One scale for both."""

    def v_scales(self, ids, head):
        return self.k_scales(ids, head)


class ScalesOfAStalePage(Twin):
    """The scales of a block's first page for all its pages, as after a late copy."""

    def v_scales(self, ids, head):
        return super().v_scales(np.full_like(ids, ids[0]), head)


class ScaleOfTheNextSlot(Twin):
    """The scales a slot off."""

    def k_scales(self, ids, head):
        return np.roll(super().k_scales(ids, head), 1, axis=-1)


class SwapsTheNibbles(Twin):
    """The low nibbles taken for the upper half of the lanes."""

    def halves(self, low, high):
        return high, low


class NibblesWithoutSign(Twin):
    """The low nibble of a byte read as 0 to 15."""

    def halves(self, low, high):
        return low & 0xF, high


class ShiftsTheLanesOfV(Twin):
    """V read from the start of its first register, where half a register of K lies too (head size 192)."""

    def v_start(self):
        return super().v_start() // 128 * 128 if self.layout.lanes > 128 else super().v_start()


class LatentVFromTheLastLanes(Twin):
    """V as the end of the latent row in place of its beginning."""

    def v_start(self):
        return self.layout.k_dim - self.layout.v_dim if self.layout.latent else super().v_start()


class IgnoresTheSink(Twin):
    """The parameter is swallowed."""

    def sink(self, head):
        return -np.inf


class SinkOfAnotherHead(Twin):
    """The sink of the next query head."""

    def sink(self, head):
        return super().sink((head + 1) % self.q.shape[1])


class CountsTheSinkInEachBlock(Twin):
    """The sink once more in each block's sum."""

    def sum_of_block(self, weights, shift, head):
        return super().sum_of_block(weights, shift, head) + np.exp(self.sink(head) - shift)


class GivesTheSinkAValue(Twin):
    """The sink adds a value too."""

    def before_keys(self, head, rows):
        top, total, values = super().before_keys(head, rows)
        return top, total, values + total[:, None]


class IgnoresTheSlopes(Twin):
    """The parameter is swallowed."""

    def slope(self, head):
        return 0.0


class SlopeOfAnotherHead(Twin):
    """The slope of the next query head."""

    def slope(self, head):
        return super().slope((head + 1) % self.q.shape[1])


class RewardsDistance(Twin):
    """ALiBi with the wrong sign."""

    def bias(self, *args):
        return -super().bias(*args)


class CapsTheBias(Twin):
    """`cap(scale q k + bias)` in place of `cap(scale q k) + bias`."""

    def logits(self, q, k, bias):
        return self.cap(self.scale(q.shape[1]) * (q @ k.T) + bias)


class TreeBitOffByOne(Twin):
    """The bit of the next new token."""

    def in_tree(self, words, new):
        return super().in_tree(words, np.where(new < 0, new, new + 1))


class TreeReadAsCausal(Twin):
    """The mask is swallowed."""

    def visible(self, t, p, seq, rows):
        return (p < self.kv_end(seq)) & self.in_causal(t, p) & self.in_window(t, p)


class FirstWordForAll(Twin):
    """New tokens past the 32nd look their bits up in the first word."""

    def in_tree(self, words, new):
        return super().in_tree(words, np.where(new < 0, new, new % 32))


class TreeHidesTheOldKeys(Twin):
    """Only new tokens are seen."""

    def in_tree(self, words, new):
        return super().in_tree(words, new) & (new >= 0)


class PositionsOf16Bits(Twin):
    """Positions that wrap at 32,768."""

    def positions(self, start, stop):
        return super().positions(start, stop).astype(np.int16)


class MergesAPartTwice(Twin):
    """The first block's result goes in twice."""

    def blocks(self, first, end):
        yield from [*super().blocks(first, end)][:1]
        yield from super().blocks(first, end)


MUTANTS = {mutant.__name__: mutant for mutant in Twin.__subclasses__()}


@functools.cache
def prepare(*names):
    case, spec = make_named_case(*names), SPECS[names[2]]
    return case, spec, *attend_densely(case, spec)


def run_all_cases(kernel: Twin, tolerance_of: str) -> None:
    """Raises AssertionError at the first of the ordinary cases that tells `kernel` from the oracle."""
    for names in ALL_CASES:
        case, spec, expected, expected_lse = prepare(*names)
        out, lse = kernel(case.q, case.pages, case.batch, spec, case.heads)
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
