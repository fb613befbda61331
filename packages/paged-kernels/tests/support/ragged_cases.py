"""Any ragged batch, for hypothesis."""

import dataclasses

from hypothesis import strategies as st
from kernel_data import EVERY_WORKLOAD, SPECS, make_case

STATICS = [
    ("mixed", "float32", "plain", "plain"),
    ("mixed", "int8", "everything", "both"),
    ("decode", "float32", "window", "alibi"),
    ("decode", "int4", "plain", "sinks"),
    ("tree_verify", "float8_e4m3fn", "window", "plain"),
    ("wide_tree", "float32", "plain", "both"),
    ("latent", "float32", "bidirectional", "both"),
    ("page_2", "bfloat16", "bidirectional_window", "alibi"),
    ("part_of_context", "float8_e5m2", "everything", "sinks"),
]
"""What a compilation depends on, by names as in `FEATURE_CASES`."""


@st.composite
def any_case(draw):
    """A case of any lengths, gaps, rows and values that fits one of a few compilations, and its spec."""
    name, kv_dtype, spec, heads = draw(st.sampled_from(STATICS))
    shape = EVERY_WORKLOAD[name]
    kv_lens, q_lens, rows_left, pages_left = [], [], shape.tokens, shape.num_pages - 2
    for _ in range(draw(st.integers(0, shape.seqs))):
        kv_len = draw(st.integers(0, min(shape.pages_per_seq, pages_left) * shape.page_size))
        most = min(rows_left, shape.max_q_len or rows_left)
        q_len = draw(st.integers(0, most if shape.q_starts else min(most, kv_len or 4)))
        kv_lens.append(kv_len)
        q_lens.append(q_len)
        rows_left, pages_left = rows_left - q_len, pages_left - -(-kv_len // shape.page_size)
    lengths = {"kv_lens": tuple(kv_lens), "q_lens": tuple(q_lens)}
    if shape.q_starts:
        lengths["q_starts"] = tuple(draw(st.integers(-50, 120)) for _ in kv_lens)
    workload = dataclasses.replace(shape, **lengths)
    seed = draw(st.integers(0, 999))
    return make_case(workload, spec=SPECS[spec], kv_dtype=kv_dtype, heads=heads, seed=seed), SPECS[spec]
