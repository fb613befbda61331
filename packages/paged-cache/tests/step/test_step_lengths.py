import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from paged_cache._src.step.step_lengths import StepLengths

PAGE_SIZE = 4


def lengths_of(pairs):
    q, kv = (np.array([pair[i] for pair in pairs], np.int32) for i in (0, 1))
    return StepLengths.of(kv, q)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)).map(lambda p: (p[0], sum(p))), max_size=5))
def test_rows_and_written_pages_agree_with_a_loop(pairs):
    lengths = lengths_of(pairs)
    positions = [(seq, position) for seq, (q, kv) in enumerate(pairs) for position in range(kv - q, kv)]
    assert lengths.positions().tolist() == [position for _, position in positions]
    written = list(dict.fromkeys(seq * 6 + position // PAGE_SIZE for seq, position in positions))
    assert lengths.written_entries(6, PAGE_SIZE).tolist() == written
    assert lengths.num_pages(PAGE_SIZE).tolist() == [-(-kv // PAGE_SIZE) for _, kv in pairs]
    assert lengths.num_tokens == len(positions)
    assert lengths.is_decode == all(q == 1 for q, _ in pairs)
